"""Preparation of scoring: models, extractors, roles, ids, and the run's fingerprint.

Runs on the driver; reads checkpoints and the metadata of a source, writes nothing.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

import vaemo
from vaemo import files
from vaemo.audio import READING
from vaemo.audio.archive import find_twins
from vaemo.config import Config
from vaemo.data.speakers import Enrolments, note_unnamed_speakers
from vaemo.errors import FeatureMismatchError, ReadManifestError, UsageError, named, rendered
from vaemo.features import describe, load_extractors
from vaemo.features.campplus import CampPlus
from vaemo.model.checkpoint import ENCODER, Checkpoint, load_checkpoint
from vaemo.parts.shards import digest
from vaemo.personalize import PERSONAL_FILE, Personal
from vaemo.pipeline.plan import Again
from vaemo.pipeline.sources import Listing, Source, StoreSource, open_source
from vaemo.progress import say
from vaemo.scores import targets_said
from vaemo.scoring.calls import Calls, read_calls
from vaemo.scoring.compatibility import check_compatible, note_other_band
from vaemo.scoring.erase import Tombstones
from vaemo.scoring.ids import IdKey
from vaemo.scoring.roles import NOT_KNOWN, RoleRules
from vaemo.targets import names_of
from vaemo.trust.judge import Judge
from vaemo.utterances import Problem
from vaemo.voices.prints import Voiceprints, valid_prints


@dataclass(frozen=True)
class Request:
    """A request to score.

    Attributes:
        source: A feature store, a manifest or a folder of recordings.
        checkpoints: Folders of checkpoints; several give mean and deviation.
        out: The folder of scores.
        calls: Table of calls, or None.
        personal: Folder of personal deltas, or None.
        speakers: File of enrolments, or None.
        roles_unknown: Score speech of unknown role in recordings.
        limit: Only the first sessions; None is all.
        dry_run: Print what would be done.
        exclude: Patterns of recordings to leave out.
        again: Which finished sessions are done again.
        voices_from: Who speaks when in recordings, a file or folder, or None.
    """

    source: str
    checkpoints: tuple[str, ...]
    out: str
    calls: str | None = None
    personal: str | None = None
    speakers: str | None = None
    roles_unknown: bool = False
    limit: int | None = None
    dry_run: bool = False
    exclude: tuple[str, ...] = ()
    again: Again = Again()  # noqa: RUF009 - frozen
    voices_from: str | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """A run of scoring, checked.

    Attributes:
        request: As given.
        config: The job's, with the checkpoints' label range and extractors.
        checkpoints: Loaded.
        source: Opened.
        listing: Its sessions, without those that were erased.
        rules: Who may be scored.
        calls: The table of calls, or None.
        extractors: Their descriptions, by stream.
        enrolments: Voices of the speakers, or None.
        key: Hides ids, or None.
        prints: Voices of persons by which roles of voices are told, or None.
        judge: Calibration and novelty of the checkpoints, or None.
    """

    request: Request
    config: Config
    checkpoints: Sequence[Checkpoint]
    source: Source
    listing: Listing
    rules: RoleRules
    calls: Calls | None
    extractors: dict[str, dict[str, Any]]
    enrolments: Enrolments | None
    key: IdKey | None
    prints: Voiceprints | None = None
    judge: Judge | None = None

    @property
    def unit(self) -> str:
        """The word for sessions in messages."""
        return "sessions" if self.source.counts_rows else self.listing.unit

    @property
    def settings(self) -> dict[str, Any]:
        """Exactly the settings that affect results: neither paths nor numbers of sessions."""
        sections = ["score", "sessions"]
        sections += ["audio", "vad", "features", "labels"] if self.source.needs_features else []
        personal = self.request.personal
        voices = voices_section(self.config, compared=self.prints is not None)
        decisive = self.config.decisive(*sections, *voices)
        if self.source.needs_features and self.checkpoints[0].has_encoder:
            # Its fingerprint is below; its path does not affect results.
            decisive["features"]["speech"] = ENCODER
        return {
            **decisive,
            **({"reading": READING} if self.source.needs_features else {}),
            "checkpoints": [checkpoint.fingerprint for checkpoint in self.checkpoints],
            "extractors": {stream: facts.get("fingerprint") for stream, facts in self.extractors.items()},
            "personal": files.read_json(files.join(personal, PERSONAL_FILE))["fingerprint"] if personal else None,
            "speaker_aggregation": self.config.features.speaker_aggregation,
            "speakers": self.enrolments.fingerprint if self.enrolments else None,
            "roles_unknown": self.rules.score_unknown,
            "id_key": self.key.check if self.key else None,
            **({"trust": self.judge.settings} if self.judge else {}),
        }

    def _voices(self) -> dict[str, Any]:
        """The provenance of voices, where voices are separated."""
        facts: dict[str, Any] = {}
        if self.request.voices_from:
            facts["voices_from"] = self.request.voices_from
        if self.prints is not None:
            identified = self.config.voices.identification.strip()
            facts["voices_compared"] = "identification among all" if identified else "verification of agent_id"
            facts["voices_identification"] = identified or None
            facts["voices_enrolled"] = len(self.prints.persons)
        return {"voices": facts} if facts else {}

    def provenance(self) -> tuple[str, dict[str, Any]]:
        """The run's fingerprint, and the other entries of `_provenance.json`."""
        settings, first = self.settings, self.checkpoints[0]
        fingerprint = digest(json.dumps(settings, sort_keys=True))
        named = [*self.listing.roles, *(self.rules.channel_roles or ())]
        if self.calls:
            named += [role for roles in self.calls.roles.values() for role in roles if role]
        return fingerprint, {
            "run_id": fingerprint[:12],
            "settings": settings,
            "config_fingerprint": self.config.fingerprint("score", "sessions", "audio", "vad", "features", "labels"),
            "checkpoints": [
                {"fingerprint": checkpoint.fingerprint, "path": path, "provenance": checkpoint.provenance}
                for checkpoint, path in zip(self.checkpoints, self.request.checkpoints, strict=True)
            ],
            "extractors": self.extractors,
            "scan": first.model.scan_used("cpu"),
            "label_range": list(first.config.model.label_range),
            "native_range": first.provenance.get("native_range"),
            **targets_said(first.config.model),
            "synthetic": _synthetic(self.checkpoints),
            "trust": self.judge.provenance if self.judge else None,
            **self._voices(),
            **self.rules.provenance(named),
            "versions": {
                "vaemo": vaemo.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "numpy", "pyarrow", "ray")},
            },
        }


def voices_section(config: Config, *, compared: bool = False) -> tuple[str, ...]:
    """The section `voices` where it says something: what was made before it existed is still the same run.

    Args:
        config: All sections.
        compared: Whether voices are compared with enrolled ones. Where they are not, and none are found in channels,
            the thresholds of the comparison decide nothing.
    """
    said = set(config.decisive("voices")["voices"])
    if config.voices.mode == "channel" and not compared:
        said -= {"verification", "verification_margin"}
    return ("voices",) if said else ()


def prepare(request: Request, config: Config) -> Run:
    """Validate a request; print warnings.

    Raises:
        RolesError: if recordings are to be scored and no roles are given.
        FeatureMismatchError: if the features are not those that the checkpoints were trained on.
        ConfigValueError: if `score.low` names what the checkpoints do not predict.
        UsageError: if there is nothing to score, or a key for ids is needed and not there.
        VaemoError: if a checkpoint, the source or the table of calls cannot be read.
    """
    rules = RoleRules.of(config.score, roles_unknown=request.roles_unknown)
    key = IdKey.from_environment("score.hash_ids") if config.score.hash_ids else None
    checkpoints = [load_checkpoint(path) for path in request.checkpoints]
    _check_different(request.checkpoints, checkpoints)
    if request.personal:
        _check_personal(request.personal, checkpoints)
    source = open_source(request.source, config, exclude=request.exclude)
    config = _with_checkpoints(config, checkpoints, source, request.source)
    config.score.low_of(config.model.utterance_targets)
    extractors = _check_extractors(checkpoints, source, config)
    calls = read_calls(request.calls, request.source) if request.calls else None
    prints = _read_prints(request, config, source, calls, extractors)
    enrolments = _read_enrolments(request.speakers, checkpoints, config, prints)
    require_encoder(config, source)
    listing = source.list(calls)
    if request.voices_from:
        listing = listing.with_turns(request.voices_from)
    for note in listing.notes:
        say(note)
    if calls:
        calls = calls.spelled_as(listing.session_ids)
        listing = _named_only(listing, calls, config, request.calls or "", key)
        listing = without_withheld(listing, calls, key)
    known = bool(calls and calls.has_roles and calls.contains(listing.session_ids).any())
    known |= bool(set(listing.roles) - set(NOT_KNOWN)) or prints is not None
    known |= any(turn.role for turns in listing.turns.values() for turn in turns)
    rules.require_roles(n_cut=listing.n_cut, known=known, calls=calls is not None)
    listing = listing.without(Tombstones.read(request.out).erased(listing.session_ids))
    if request.limit is not None:
        listing = listing.select(range(min(request.limit, len(listing.session_ids))))
    judge = _judge(request.checkpoints, checkpoints, config)
    run = Run(request, config, checkpoints, source, listing, rules, calls, extractors, enrolments, key, prints, judge)
    _warn(run)
    return run


def _check_different(paths: Sequence[str], checkpoints: Sequence[Checkpoint]) -> None:
    """Raise UsageError for a model that is given twice: the deviation over models would be too small."""
    given: dict[str, str] = {}
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if first := given.get(checkpoint.fingerprint):
            raise UsageError(f"the checkpoints {first} and {path} are the same model; give each model once.")
        given[checkpoint.fingerprint] = path


def _judge(paths: Sequence[str], checkpoints: Sequence[Checkpoint], config: Config) -> Judge | None:
    """Calibration and novelty of the checkpoints."""
    fingerprints = [checkpoint.fingerprint for checkpoint in checkpoints]
    score = config.score
    judge = Judge.of(paths, fingerprints, score.coverage, score.max_novelty, names_of(config.model.targets))
    if score.max_novelty < 1 and not (judge and judge.novelty):
        raise UsageError(
            f"score.max_novelty is {score.max_novelty:g}, and the checkpoint {paths[0]} does not know what it was "
            "trained on (novelty.safetensors). Train it again, or leave the setting out."
        )
    return judge


def without_withheld(listing: Listing, calls: Calls, key: IdKey | None = None) -> Listing:
    """The listing, with sessions that must not be processed marked, so that they are not read.

    So are copies of them, which are compared by their bytes. A table may name calls of other sources too; an objection
    that applies to none here may also be mistyped, so it is said.
    """
    if stray := calls.stray_objections(listing.session_ids):
        told = (
            f"note: {len(stray):,} of the calls that may not be processed (process: false) are not in this source, "
            f"such as {named(stray[0])}."
        )
        _say(told, key)
    refused = np.flatnonzero(calls.withheld(listing.session_ids)).tolist()
    withheld = Problem("withheld", "the table of calls says that it may not be processed")
    copied = Problem("withheld", "the table of calls says that a recording with the same bytes may not be processed")
    problems = {**dict.fromkeys(_copies_of(refused, listing), copied), **dict.fromkeys(refused, withheld)}
    return replace(listing, problems={**listing.problems, **problems})


def _copies_of(refused: Sequence[int], listing: Listing) -> list[int]:
    """The other recordings whose bytes are those of one of these."""
    if not listing.files:
        return []
    sizes = {listing.files[number].size for number in refused}
    same = {number: found for number, found in enumerate(listing.files) if found.size in sizes}
    twins = find_twins(list(same.values()), known={}, group=lambda _: None)
    first = {number: twins.get(found.name, found.name) for number, found in same.items()}
    withheld = {first[number] for number in refused}
    return [number for number, name in first.items() if name in withheld]


def _with_checkpoints(config: Config, checkpoints: Sequence[Checkpoint], source: Source, where: str) -> Config:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if _predicts(other) != _predicts(first) or other.features != first.features:
            raise FeatureMismatchError(
                "the checkpoints differ in their targets, their label range or their features: "
                f"{_predicts(first)} and {_predicts(other)}; {first.features} and "
                f"{other.features}. Score them one by one."
            )
    # Settings of other targets do not apply to these.
    model = Config().to_dict()["model"] | {"label_range": list(first.config.model.label_range)}
    sections = {"model": model | {"targets": first.config.model.targets}}
    if first.features is not None:
        trained = first.config.to_dict()
        sections["features"] = trained["features"]
        sections["audio"] = {"simulate_telephone": trained["audio"]["simulate_telephone"]}
    if source.needs_features and first.features is None:
        raise FeatureMismatchError(
            "the checkpoint does not say which extractors its features come from, so the features of "
            f"{where} cannot be computed. Train on a store that jobs/extract.py wrote, or score a store."
        )
    return config.replace(sections)


def _predicts(checkpoint: Checkpoint) -> str:
    """What a checkpoint predicts, and on which range."""
    model = checkpoint.config.model
    names = [*model.utterance_targets, *(f"{name} of the session" for name in model.session_targets)]
    return f"{', '.join(names)} on {list(model.label_range)}"


def _check_personal(personal: str, checkpoints: Sequence[Checkpoint]) -> None:
    if len(checkpoints) > 1:
        raise UsageError(
            f"--personal belongs to one checkpoint, and {len(checkpoints)} are given; score with that one alone."
        )
    Personal.load(personal, fingerprint=checkpoints[0].fingerprint)


def require_encoder(config: Config, source: Source) -> None:
    """Raise an error early, on the driver, if the encoder that separates voices is missing.

    Raises:
        ExtractorError: if it is not installed.
    """
    if config.voices.mode != "channel" and source.needs_features and not source.counts_rows:
        CampPlus()


def _read_prints(
    request: Request, config: Config, source: Source, calls: Calls | None, extractors: Mapping[str, Any]
) -> Voiceprints | None:
    """The enrolled voices, if roles of voices depend on them: of agents named by calls, or of all."""
    named_agents, identified = bool(calls and calls.agent_ids), bool(config.voices.identification.strip())
    voices = config.voices.mode != "channel" or bool(request.voices_from)
    if isinstance(source, StoreSource):
        fits = extractors.get("speaker", {}).get("fingerprint") == CampPlus.made_by
        voices = bool(fits) and "voice" in source.store.columns
    if not (request.speakers and voices and (named_agents or identified)):
        if identified and not request.speakers:
            raise UsageError(
                "voices.identification is given without --speakers: there is no enrolled voice to compare with."
            )
        return None
    return valid_prints(request.speakers)


def _read_enrolments(
    path: str | None, checkpoints: Sequence[Checkpoint], config: Config, prints: Voiceprints | None
) -> Enrolments | None:
    """The enrolments for the checkpoints; an error if they need none, or do not match."""
    how, dim = config.features.speaker_aggregation, checkpoints[0].model.dims.get("speaker")
    if how != "enrolled" or dim is None:
        if path and prints is None:
            raise UsageError(
                f"--speakers {path} is given, and the checkpoint uses no enrolments "
                f"({'it has no speaker stream' if dim is None else f'features.speaker_aggregation is {how}'}). "
                "Leave it out. To identify the agent's voice, give --calls with agent_id, and voices.mode=auto."
            )
        return None
    if path is None:
        raise UsageError(
            "the checkpoint was trained on enrolled speakers (features.speaker_aggregation): give their voices with "
            "--speakers FILE, a Parquet file with speaker_id and speaker."
        )
    enrolments = Enrolments.read(path)
    if enrolments.dim != dim:
        raise FeatureMismatchError(
            f"the enrolments {path} have {enrolments.dim} numbers; the checkpoint's speaker stream has {dim}. Enrol "
            "with the checkpoint's extractor."
        )
    return enrolments


def _check_extractors(checkpoints: Sequence[Checkpoint], source: Source, config: Config) -> dict[str, dict[str, Any]]:
    """The extractors' descriptions, by stream; an error if they do not match."""
    if isinstance(source, StoreSource):
        described, dims = dict(source.store.info.get("extractors", {})), dict(source.store.dims)
        where = f"the store {source.store.path}"
    else:
        described = describe(load_extractors(config.features))
        dims = {stream: facts["dim"] for stream, facts in described.items()}
        where = "the checkpoint's own list of extractors"
    made_by = {stream: facts.get("fingerprint") for stream, facts in described.items()}
    for checkpoint in checkpoints:
        trained_on = checkpoint.provenance.get("feature_fingerprints", {})
        check_compatible(checkpoint.model, trained_on, dims, made_by, where)
    return described


def _warn(run: Run) -> None:
    sequence_by, listing = run.config.sessions.sequence_by, run.listing
    for checkpoint in run.checkpoints:
        trained = checkpoint.config.sessions.sequence_by
        if trained != sequence_by:
            say(
                f"warning: sessions.sequence_by is {sequence_by}, the checkpoint was trained with {trained}; "
                f"--set sessions.sequence_by={trained} scores as it was trained."
            )
    if isinstance(run.source, StoreSource):
        pasts = [name for checkpoint in run.checkpoints for name in checkpoint.model.pasts]
        note_unnamed_speakers(run.source.store, pasts)
        note_other_band(run.checkpoints[0], run.source.store)
    made_up = isinstance(run.source, StoreSource) and run.source.store.info.get("synthetic")
    if _synthetic(run.checkpoints) and not made_up:
        say(
            "warning: the checkpoint was trained on synthetic speech (provenance: synthetic). Its scores of real "
            "recordings mean nothing; train on labelled speech."
        )
    for note in run.judge.notes if run.judge else ():
        say(note)
    if run.judge and run.judge.calibration and run.request.personal:
        say("warning: the intervals were calibrated without --personal; with it their coverage is not known.")
    if run.rules.score_unknown and listing.n_cut:
        say("warning: --roles-unknown scores all channels of recordings; employees may be included.")


def _say(told: str, key: IdKey | None) -> None:
    """Say something of calls, their ids hidden where those of the scores are."""
    say(rendered(told, key.hash if key else str))


def _named_only(listing: Listing, calls: Calls, config: Config, path: str, key: IdKey | None) -> Listing:
    """The listing, in which sessions that the table of calls does not name are not scored.

    The table decides who may be scored: a person it does not name may be an employee.
    """
    absent = np.flatnonzero(~calls.contains(listing.session_ids)).tolist()
    if not absent:
        return listing
    n, example = len(listing.session_ids), named(listing.session_ids[absent[0]])
    if config.score.calls_missing == "channel_roles":
        told = f"warning: {len(absent):,} of {n:,} sessions are not in the table of calls, such as {example}."
        _say(told, key)
        return listing
    refuse_other_calls(listing, calls, path)
    told = (
        f"warning: {len(absent):,} of {n:,} sessions are not in the table of calls and are not scored, such as "
        f"{example}. --set score.calls_missing=channel_roles takes score.channel_roles for them."
    )
    _say(told, key)
    refused = Problem("not_scored_role", "not in the table of calls")
    return replace(listing, problems={**dict.fromkeys(absent, refused), **listing.problems})


def refuse_other_calls(listing: Listing, calls: Calls, path: str) -> None:
    """Refuse a table of calls that names none of the sessions: who must not be processed would be missed.

    Raises:
        ReadManifestError: with an id of either side.
    """
    n = len(listing.session_ids)
    if n and not calls.contains(listing.session_ids).any():
        known = f"such as {named(calls.rows['session_id'][0])}" if len(calls.rows) else "none at all"
        raise ReadManifestError(
            f"the table of calls {path} names none of the {n:,} sessions: they are called such as "
            f"{named(listing.session_ids[0])}, those in the table {known}. Nothing that it says applies to them; "
            "correct the ids."
        )


def _synthetic(checkpoints: Sequence[Checkpoint]) -> bool:
    return any(checkpoint.provenance.get("synthetic") for checkpoint in checkpoints)
