"""The model card: a `README.md` in a checkpoint that describes the model, its results and its permitted use.

Reads the files of a checkpoint and, where there is one, the result of an evaluation; loads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vaemo import files
from vaemo.config import strict_yaml
from vaemo.errors import ReadCheckpointError, StorageError
from vaemo.features.prosody import FEATURE_SETS
from vaemo.targets import names_of, session_names, targets_of, utterance_names
from vaemo.units import DIMENSIONS

CARD = "README.md"

_SHOWN = (("CCC", "ccc"), ("CCC within sessions", "within_ccc"), ("RMSE", "rmse"), ("Pearson's r", "pearson"))
_RIVALS = (("ridge", "ridge on the features"), ("ridge_ema", "ridge on the features and their causal EMA"))
_BUILT_IN = {"logmel", "ltas"}

LIMITS = """\
## Intended use

Estimates of valence (unpleasant to pleasant) and arousal (calm to excited) for the utterances of a conversation, for
research on speech and emotion, and for summaries of many calls that a person looks at. The scores say how a voice
sounds to annotators of the training data. They do not show what a person feels, thinks or is.

Not for decisions about a single person without human judgement, not for people, languages, recording conditions or
ways of speaking that the training data does not have: there the numbers below do not hold.

## Law

- European Union: inferring emotions of **employees** at work is prohibited (AI Act, Art. 5(1)(f)), except for medical
  or safety reasons. vaemo scores customers only, unless an exception is declared, which is then written down.
- Emotion recognition of **customers** is high-risk (Annex III) and they must be informed (Art. 50).
- Voices are personal data: a legal basis and an assessment under the GDPR are needed before recordings are scored.

This is no legal advice; have counsel check your case."""


def write_card(checkpoint: str, evaluation: Mapping[str, Any] | None = None) -> None:
    """Write the card into a checkpoint's folder, over an older one.

    Args:
        checkpoint: The folder.
        evaluation: The content of an evaluation's `metrics.json`; None gives the development set's metrics alone.

    Raises:
        ReadCheckpointError: if the folder lacks one of the files of a checkpoint.
    """
    try:
        config = strict_yaml.load(files.read_bytes(files.join(checkpoint, "config.yaml")), "config.yaml")
        metrics = files.read_json(files.join(checkpoint, "metrics.json"))
        provenance = files.read_json(files.join(checkpoint, "provenance.json"))
    except (OSError, StorageError, strict_yaml.NotPlainYaml) as error:
        raise ReadCheckpointError(f"'{checkpoint}' is not a whole checkpoint: {error}") from None
    path = files.join(checkpoint, "calibration.json")
    calibration = files.read_json(path) if files.exists(path) else None
    card = card_of(config, metrics, provenance, evaluation, calibration)
    files.write_whole(files.join(checkpoint, CARD), card.encode())


def card_of(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown.

    Args:
        config: Content of `config.yaml`; without `features` the extractors are unknown.
        metrics: Content of `metrics.json`.
        provenance: Content of `provenance.json`.
        evaluation: As for `write_card`.
        calibration: Content of `calibration.json`, or None.
    """
    model = config["model"]
    targets = names_of(targets_of(model.get("targets", DIMENSIONS)))
    synthetic = "**Trained on synthetic speech: scores of real people mean nothing.**"
    sections = {
        "Model": _model(config, provenance),
        "Data": [
            f"- fingerprint of ids, labels and splits: `{provenance.get('data_fingerprint', 'unknown')}`",
            f"- roles trained on: {', '.join(provenance['roles']) if provenance.get('roles') else 'none declared'}",
        ],
        "Results": _results(metrics, evaluation, targets, chosen=config["train"]["select"] == "best"),
        "Trust": [*_trust(evaluation, calibration), "", LIMITS],
        "Licences of what the features come from": _licences(config.get("features"), provenance.get("encoder")),
        "Config": ["```yaml", strict_yaml.dump(dict(config)).strip(), "```"],
    }
    lines = ["# vaemo session model", "", f"{_predicted(model)}, online, with a memory of the conversation.", ""]
    lines += [synthetic, ""] if provenance.get("synthetic") else []
    for title, held in sections.items():
        lines += [f"## {title}", "", *held, ""]
    return "\n".join(lines)


def _model(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[str]:
    model, layers = config["model"], config["updater"]["layers"]
    streams = provenance.get("streams", ("speech", "prosody", "speaker"))
    speaker = f"`{model['film']}`" if "speaker" in streams else "none"
    prosody = "yes" if model["prosody"] and "prosody" in streams else "no"
    return [
        f"- updater: `{model['updater']}` ({layers} layer), state width {model['d_c']}, EMA `{model['ema']}` "
        f"(alpha {model['alpha']})",
        f"- feedback in training: `{model['feedback']}`; speaker: {speaker}; prosody: {prosody}"
        + (f"; a network on speech (`{model['speech_mlp']}`)" if model.get("speech_mlp", "none") != "none" else ""),
        *_compared(provenance.get("compared_with_past", ()), model),
        f"- predictions on {model['label_range']}"
        + (f"; the corpus's own range is {provenance['native_range']}" if provenance.get("native_range") else ""),
        f"- one memory per {provenance.get('sequence_by', 'session')}",
        f"- fingerprint `{provenance.get('fingerprint', 'unknown')}`, vaemo {provenance.get('version', 'unknown')}, "
        f"seed {provenance.get('seed', 'unknown')}",
    ]


def _compared(pasts: Sequence[str], model: Mapping[str, Any]) -> list[str]:
    if not pasts:
        return []
    named = [f"{stream} with the {whose}'s" for whose, _, stream in (past.partition(".") for past in pasts)]
    return [
        f"- compared with the past of the session: {', '.join(named)} (weight of the training mean "
        f"{model['speaker_norm_weight']:g} utterances)"
    ]


def _predicted(model: Mapping[str, Any]) -> str:
    """What is predicted, of an utterance and of the whole conversation."""
    targets = targets_of(model.get("targets", DIMENSIONS))
    of = ((utterance_names(targets), "every utterance of a conversation"), (session_names(targets), "the whole of it"))
    parts = [f"{_listed(names)} of {what}" for names, what in of if names]
    return " and ".join(parts).capitalize()


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _results(
    metrics: Mapping[str, Any], evaluation: Mapping[str, Any] | None, targets: Sequence[str], *, chosen: bool
) -> list[str]:
    names = (*targets, "avg")
    lines = [f"| | {' | '.join(targets)} | average |", "|---" * (len(names) + 1) + "|"]
    if evaluation is not None:
        pooled = evaluation["pooled"]
        for title, metric in _SHOWN:
            # Evaluations of older versions know no CCC within sessions.
            if f"{metric}_avg" not in pooled:
                continue
            cells = (_cell(pooled, f"{metric}_{name}") for name in names)
            lines.append(f"| {title}, {evaluation['split']} | {' | '.join(cells)} |")
    on_dev = (_number(metrics.get(f"dev_ccc_{name}")) for name in names)
    lines.append(f"| CCC, dev{' (the model was chosen by it)' if chosen else ''} | {' | '.join(on_dev)} |")
    if "dev_within_ccc_avg" in metrics:
        on_dev = (_number(metrics.get(f"dev_within_ccc_{name}")) for name in names)
        lines.append(f"| CCC within sessions, dev | {' | '.join(on_dev)} |")
    for key, title in _RIVALS:
        if rival := metrics.get("rivals", {}).get(key):
            cells = (_number(rival.get(f"dev_ccc_{name}")) for name in names)
            lines.append(f"| CCC, dev, {title} | {' | '.join(cells)} |")
    lines += ["", "CCC is over all utterances, which rewards knowing the session too; within sessions predictions and "]
    lines[-1] += "labels are taken less their means over the session."
    if evaluation is not None:
        pooled = evaluation["pooled"]
        lines += [
            "",
            f"{pooled['n']:,} utterances of {pooled['n_sessions']:,} sessions; CCC on "
            f"{evaluation['variance']} variances; 95 % intervals from resampled sessions.",
        ]
    return lines


def _trust(evaluation: Mapping[str, Any] | None, calibration: Mapping[str, Any] | None) -> list[str]:
    """What intervals rest on, how often they covered, and results by group."""
    if calibration is None:
        lines = ["- no intervals: the model is not calibrated (a split `calib`, `--folds`, or `jobs/calibrate.py`)"]
    else:
        n = min((margin["n_groups"] for margin in calibration["utterances"].values()), default=0)
        lines = [
            f"- intervals are calibrated on {calibration['made_on']}: {n} groups of sessions linked by speakers",
            "- they hold for a random utterance, or call, of a new group of the same kind: annotators' mean labels, "
            "not feelings, and not their share within every call",
        ]
        for name, each in calibration["correction"].items():
            lines.append(f"- {name} is corrected: {each['offset']:+.3f} {each['slope']:+.3f} * score")
    measured = (evaluation or {}).get("coverage")
    for kind, title in (("utterances", "utterances"), ("calls", "means of calls")):
        for name, found in (measured[kind] if measured else {}).items():
            if found["n"]:
                lines.append(
                    f"- {title}, {name}: {100 * found['covered_of_sessions']:.1f} % inside, width {found['width']:.3f}"
                )
    for column, found in (evaluation or {}).get("by", {}).items():
        first: Mapping[str, Any] = next(iter(found["groups"].values()), {})
        biases = (key for key in first if key.startswith("bias_") and key != "bias_avg")
        keys = ["ccc_avg", *biases, "mae_avg"]
        lines += ["", f"| {column} | speakers | {' | '.join(key.replace('_', ' ') for key in keys)} |"]
        lines += ["|---" * (2 + len(keys)) + "|"]
        for group, each in found["groups"].items():
            cells = (_cell(each, key) for key in keys)
            few = " (few)" if each["small"] else ""
            lines.append(f"| {group} | {each['n_speakers']}{few} | {' | '.join(cells)} |")
        for metric, gap in (found["largest_gap"] or {}).items():
            lines += ["", f"Largest gap of {metric} ({gap['of']}): {' less '.join(gap['groups'])} "]
            lines[-1] += f"{gap['difference']:+.3f}, p = {gap['p']:.3f} among {gap['compared']} comparisons."
    return lines


def _cell(pooled: Mapping[str, Any], name: str) -> str:
    bounds = pooled.get("ci95", {}).get(name)
    text = _number(pooled.get(name))
    return text if bounds is None else f"{text} [{_number(bounds[0])}, {_number(bounds[1])}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _licences(features: Mapping[str, Any] | None, encoder: Mapping[str, Any] | None) -> list[str]:
    if features is None:
        return ["- unknown: the store does not say which extractors made it"]
    lines = []
    for stream in ("speech", "prosody", "speaker"):
        name = features[stream]
        if name == "none":
            continue
        if name in _BUILT_IN:
            licence = "part of vaemo, Apache-2.0, no weights"
        elif name in FEATURE_SETS:
            declared = features.get("opensmile_license") or "not declared"
            licence = (
                f"openSMILE (audEERING): free for research, commercial use needs an agreement; declared use: {declared}"
            )
        elif name == "praat":
            licence = "Praat through parselmouth, GPL-3.0"
        else:
            licence = "a pretrained encoder: its own licence applies, and that of the data it was trained on"
            if stream == "speech" and encoder:
                name, licence = encoder["name"], f"{licence}; trained further with this model ({encoder['trained']})"
        lines.append(f"- {stream}: `{name}`: {licence}")
    return lines
