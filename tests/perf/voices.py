"""Measures how well voices are told apart in mono calls, and what of the other person is scored as the customer.

    PYTHONPATH=tests python tests/perf/voices.py --emodb FOLDER --prompts /usr/share/asterisk/sounds --seconds 90

Emo-DB gives pairs of one language and sex; Debian's packages asterisk-core-sounds-{en,es,fr,it}-wav and
asterisk-prompt-{fr-armelle,it-menardi-wav,es-co} give calm voices. Errors are those of `pyannote.metrics`. The peer is
senko's own diariser on silero's activity. Prints a table, one line a set and condition.
"""

import argparse
import functools
import hashlib
import io
import itertools
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import soundfile
import torch
from mono_calls import CONDITIONS, RATE, Call, Voice, emodb, make_call, prompts, write_call
from pyannote.core import Annotation, Segment, Timeline
from pyannote.metrics.diarization import DiarizationErrorRate, JaccardErrorRate

from vaemo.audio.recording import FILTER_ZEROS, Decoder
from vaemo.audio.sinc import resample
from vaemo.config import Config, FeatureConfig
from vaemo.data.speakers import unit
from vaemo.features import campplus, load_extractors
from vaemo.utterances import Parties, extract_recording
from vaemo.voices.enrol import enrol
from vaemo.voices.roles import Evidence, expected_voice, roles_of_voices

MARGINS = (0.1, 0.14, 0.2)
ENROLLED_CLIPS = 10
WINDOW, WINDOWS_EACH = 12_000, 70
STRANGERS = 2
NOTICED_S = 1.0
"""An agent is scored as the customer where that is so for longer."""

EMODB = {
    "dev": (("03", "10"), ("08", "09"), ("08", "13"), ("09", "13")),
    "test": (("11", "12"), ("11", "15"), ("12", "15"), ("14", "16")),
}
"""Pairs of one sex; nobody is in both halves. Thresholds are chosen on `dev` alone."""

PROMPTS = {
    "dev": {
        1: (("it_IT_f_Menardi",), ("it_IT_m_Carlo",), ("ru_RU_f_IvrvoiceRU",)),
        2: (("it_IT_f_Menardi", "it_IT_m_Carlo"),),
        3: (("it_IT_m_Carlo", "ru_RU_f_IvrvoiceRU", "it_IT_f_Menardi"),),
    },
    "test": {
        1: (("fr",), ("fr_CA_f_June",), ("es",), ("es_MX_f_Allison",), ("en_US_f_Allison",)),
        2: (("fr", "fr_CA_f_June"), ("es", "es_MX_f_Allison")),
        3: (("fr", "fr_CA_f_June", "es"), ("es", "es_MX_f_Allison", "fr"), ("fr", "en_US_f_Allison", "es")),
    },
}
TWO_LANGUAGES = {
    "dev": (("ru_RU_f_IvrvoiceRU", "it_IT_f_Menardi"),),
    "test": (("en_US_f_Allison", "fr_CA_f_June"), ("es", "fr"), ("es_MX_f_Allison", "fr")),
}


def annotation(turns):
    held = Annotation()
    for n, (start, end, who) in enumerate(turns):
        held[Segment(start, end), n] = who
    return held


def not_enrolled(voice):
    """The voice, less the clips that it is enrolled from."""
    return Voice(voice.name, voice.language, voice.sex, voice.clips[ENROLLED_CLIPS:])


@functools.cache
def enrolled(voice, condition):
    """The voiceprint that `vaemo enrol` makes of clips, recorded as the calls are but without babble."""
    with tempfile.TemporaryDirectory() as folder:
        write_call(Call(voice.name, np.concatenate(voice.clips[:ENROLLED_CLIPS]), ()), Path(folder), condition)
        return enrol(folder)


def remember_vectors():
    """A call is heard again for everybody who might be named as its agent, and embedded once."""
    heard, embed_ = {}, campplus.embed

    def remembering(windows):
        key = hashlib.sha256(windows.tobytes()).digest()
        if key not in heard:
            heard[key] = embed_(windows)
        return heard[key]

    campplus.embed = remembering


class Senko:
    """The peer: its own windows, clusters and merging, on one core."""

    def __init__(self):
        import senko

        self._diarizer = senko.Diarizer(device="cpu", vad="silero", warmup=False, quiet=True)

    def __call__(self, path):
        samples, rate = soundfile.read(path, dtype="float32")
        samples = resample(torch.from_numpy(samples), rate, 16000, FILTER_ZEROS).numpy()
        found = self._diarizer.diarize_samples(np.clip(samples, -1, 1))
        torch.set_num_threads(1)
        return [(s["start"], s["end"], s["speaker"]) for s in (found or {"merged_segments": []})["merged_segments"]]


def measure(sets, babble, condition, most, args, decoder, peer):
    config = Config().replace({"voices": {"mode": "diarize", "voices": most}})
    metrics = {
        (who, collar): DiarizationErrorRate(collar=collar) for who in ("vaemo", "senko") for collar in (0.0, 0.5)
    }
    jer = JaccardErrorRate()
    true, wrong, swept = [], [], {least: np.zeros(2) for least in MARGINS}
    right, calls, cpu_s, audio_s = 0, 0, 0.0, 0.0
    scored, other, asked, decided, unenrolled_scored = 0.0, 0.0, 0.0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number, voices in enumerate(itertools.islice(itertools.cycle(sets), args.calls)):
            agent = not_enrolled(voices[0])
            people = [agent, *voices[1:]]
            strangers = [voice for voice in babble if voice.name not in {v.name for v in voices}][:5]
            name = f"{condition}-{len(voices)}-{number}"
            call = make_call(name, people, number, seconds=args.seconds, condition=condition, babble=strangers)
            path = write_call(call, Path(folder), condition)
            began = time.process_time()
            held_rows, heard = hear(path, name, enrolled(voices[0], condition), config, decoder)
            cpu_s += time.process_time() - began
            true.append(heard)
            named = [voice for voice in strangers if voice.sex == agent.sex][:STRANGERS] if len(voices) == 2 else []
            for stranger in named:
                # The agent is not enrolled, and somebody else is named.
                found, heard = hear(path, name, enrolled(stranger, condition), config, decoder)
                wrong.append(heard)
                theirs_too = [t for t in call.turns if t.speaker != agent.name]
                own = [t for t in call.turns if t.speaker == agent.name]
                wrongly = [row for row in found if row["role"] == "customer"]
                unenrolled_scored += sum(overlap(row, own, theirs_too) for row in wrongly) > NOTICED_S
                calls += 1
            audio_s += len(call.samples) / RATE
            reference = annotation([(t.start_s, t.end_s, t.speaker) for t in call.turns])
            whole = Timeline([Segment(0.0, len(call.samples) / RATE)])
            found = annotation([(r["start_s"], r["end_s"], str(r["voice"])) for r in held_rows])
            theirs = annotation(peer(path)) if peer else None
            for (who, _), metric in metrics.items():
                if who == "vaemo" or theirs is not None:
                    metric(reference, found if who == "vaemo" else theirs, uem=whole)
            jer(reference, found, uem=whole)
            right += len({r["voice"] for r in held_rows}) == len(voices)
            customers = [r for r in held_rows if r["role"] == "customer"]
            decided += bool(customers)
            if len(voices) == 2:
                agent_turns = [t for t in call.turns if t.speaker == agent.name]
                customer_turns = [t for t in call.turns if t.speaker != agent.name]
                for least in MARGINS:
                    sure = [row for row in customers if (row["voice_margin"] or 0.0) >= least]
                    swept[least] += (
                        sum(r["end_s"] - r["start_s"] for r in sure),
                        sum(overlap(r, agent_turns, customer_turns) for r in sure),
                    )
                scored += sum(r["end_s"] - r["start_s"] for r in customers)
                other += sum(overlap(r, agent_turns, customer_turns) for r in customers)
                asked += sum(t.end_s - t.start_s for t in customer_turns)
    n = args.calls
    parts = metrics["vaemo", 0.5][:]
    line = f"{condition:7s} at most {most} voices, n={n} right {right}/{n}"
    for who in ("vaemo", "senko") if theirs is not None else ("vaemo",):
        line += f" | {who} DER {100 * abs(metrics[who, 0.0]):.1f} % (collar 0)"
        line += f", {100 * abs(metrics[who, 0.5]):.1f} % (0.25 s)"
    total = parts["total"]
    line += " | " + ", ".join(
        f"{k} {100 * parts[k] / total:.1f}" for k in ("missed detection", "false alarm", "confusion")
    )
    line += f" | JER {100 * abs(jer):.1f}"
    if asked:
        line += f" | customer scored in {decided}/{n} calls, {scored:.0f} of {asked:.0f} s"
        line += f", of them {other:.1f} s the agent's"
        line += f" ({100 * other / max(scored, 1e-9):.1f} %); agents not enrolled: {unenrolled_scored}/{calls} scored"
    elif len(voices) > 1:
        line += f" | somebody scored as the customer, though there are {len(voices)} voices, in {decided}/{n} calls"
    if asked:
        line += " | by margin " + ", ".join(
            f"{least:.2f}: {other_s:.1f} of {all_s:.0f} s" for least, (all_s, other_s) in swept.items()
        )
        shown = [[f"{best:.2f} by {margin:.2f}" for best, margin in sorted(held)] for held in (true, wrong)]
        line += f" | likeness of agents {', '.join(shown[0][:4])}, ...; of strangers ..., {', '.join(shown[1][-4:])}"
    print(line + f" | {audio_s / max(cpu_s, 1e-9):.0f} x real time", flush=True)


def hear(path, name, prints, config, decoder):
    """Rows with speech of a call whose agent is the one enrolled; how much like that the likeliest voice is, and how
    much more so than the next."""
    heard, evidence = [], Evidence(agent_id=prints.persons[0])

    def roles(voices, lines):
        heard.extend(sorted((float(voice.vector @ prints.vectors[0]) for voice in voices), reverse=True))
        return roles_of_voices(voices, lines, evidence, prints, config.voices)

    expected = expected_voice(evidence, prints, config.voices)
    parties = Parties(roles_of_voices=roles, verifies=True, expected=expected)
    rows = extract_recording(str(path), name, extractors={}, config=config, decoder=decoder, parties=parties)
    margin = heard[0] - heard[1] if len(heard) > 1 else 0.0
    return [row for row in rows.to_pylist() if row["start_s"] is not None], (heard[0], margin)


def overlap(row, turns, others):
    """Seconds of a row in which somebody of these turns speaks, and nobody of the others."""
    grid = np.arange(row["start_s"], row["end_s"], 0.01)
    mine = np.zeros(len(grid), bool)
    theirs = np.zeros(len(grid), bool)
    for turn in turns:
        mine |= (grid >= turn.start_s) & (grid < turn.end_s)
    for turn in others:
        theirs |= (grid >= turn.start_s) & (grid < turn.end_s)
    return 0.01 * float((mine & ~theirs).sum())


def equal_error_rates(title, voices):
    """Of 1.5 s windows of persons of one sex, telephone speech, by the cosine of two windows' vectors."""
    windows, names = [], []
    for voice in voices:
        clips = [clip for clip in voice.clips if len(clip) >= WINDOW][:WINDOWS_EACH]
        windows += [telephone(clip[:WINDOW]) for clip in clips]
        names += [(voice.sex, voice.name)] * len(clips)
    sexes, people = (np.array(part) for part in zip(*names, strict=True))
    row, column = np.triu_indices(len(people), 1)
    trials = sexes[row] == sexes[column]
    same = (people[row] == people[column])[trials]
    for stream in ("ltas", "campplus"):
        extractor = load_extractors(FeatureConfig(speech="none", prosody="none", speaker=stream))["speaker"]
        vectors = unit(np.asarray(extractor(windows)))
        likeness = (vectors[row[trials]] * vectors[column[trials]]).sum(axis=1)
        thresholds = np.quantile(likeness, np.linspace(0, 1, 2000))
        missed = np.searchsorted(np.sort(likeness[same]), thresholds) / same.sum()
        taken = 1 - np.searchsorted(np.sort(likeness[~same]), thresholds) / (~same).sum()
        at = np.abs(missed - taken).argmin()
        rate = 50 * (missed[at] + taken[at])
        print(f"{title}: {stream} equal error rate {rate:.1f} %, {len(people)} windows", flush=True)


def telephone(clip):
    """A clip as mu-law, resampled as recordings are."""
    held = io.BytesIO()
    soundfile.write(held, clip, RATE, format="WAV", subtype="ULAW")
    held.seek(0)
    return resample(torch.from_numpy(soundfile.read(held, dtype="float32")[0]), RATE, 16000, FILTER_ZEROS).numpy()


def speed(voices, minutes, decoder):
    """All that extraction does to a call of which 60 % is speech: decoding, voices, speech, prosody, speaker."""
    config = Config().replace(
        {"voices": {"mode": "diarize"}, "features": {"speaker": "campplus", "opensmile_license": "research"}}
    )
    extractors = load_extractors(config.features)
    call = make_call("call", voices, 0, seconds=40.0).samples
    block = np.concatenate([call[: 36 * RATE], np.random.default_rng(0).normal(0, 1e-4, 24 * RATE).astype(np.float32)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "call.wav"
        soundfile.write(path, np.tile(block, minutes), RATE, subtype="ULAW")
        began = time.perf_counter()
        rows = extract_recording(str(path), "call", extractors=extractors, config=config, decoder=decoder)
        wall_s = time.perf_counter() - began
    speech_s = sum(row["end_s"] - row["start_s"] for row in rows.to_pylist())
    share = speech_s / (60 * minutes)
    print(
        f"{minutes} min, {100 * share:.0f} % speech: {wall_s:.1f} s, {60 * minutes / wall_s:.1f} x real time",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emodb", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--calls", type=int, default=6, help="calls of a set and condition")
    parser.add_argument("--half", choices=sorted(EMODB), default="test", help="of the voices")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--voices", type=int, nargs="*", default=[2, 1, 3])
    parser.add_argument("--conditions", nargs="*", default=CONDITIONS)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--eer", action="store_true", help="measure nothing but speaker streams")
    parser.add_argument("--speed", type=int, nargs="*", metavar="MINUTES", help="measure nothing but speed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    decoder, peer = Decoder(120), None if args.no_peer or args.speed or args.eer else Senko()
    if args.eer:
        for title, known in (
            ("Emo-DB", emodb(args.emodb) if args.emodb else {}),
            ("prompts", prompts(args.prompts) if args.prompts else {}),
        ):
            if known:
                equal_error_rates(title, known.values())
        decoder.close()
        return
    if args.speed:
        known = list(prompts(args.prompts, PROMPTS["test"][2][0]).values())
        for minutes in [1, *args.speed]:  # the first one warms up
            speed(known, minutes, decoder)
        decoder.close()
        return
    remember_vectors()
    actors = emodb(args.emodb) if args.emodb else {}
    speakers = prompts(args.prompts) if args.prompts else {}
    for n, condition in itertools.product(args.voices, args.conditions):
        sets = {}
        if known := actors:
            pairs = EMODB[args.half]
            both = [pair[::order] for order in (1, -1) for pair in pairs]
            alone = [(name,) for name in dict.fromkeys(itertools.chain(*pairs))]
            sets["Emo-DB"] = known, {1: alone, 2: both, 3: ()}[n]
        if known := speakers:
            sets["prompts"] = known, [names[::order] for order in (1, -1) for names in PROMPTS[args.half][n]]
            if n == 2:
                sets["two languages"] = known, TWO_LANGUAGES[args.half]
        for title, (known, names) in sets.items():
            if names:
                people = [[known[name] for name in of_call] for of_call in names]
                others = {x for pair in EMODB[args.half] for x in pair} if title == "Emo-DB" else set(known)
                babble = [voice for voice in known.values() if voice.name in others]
                for most in (Config().voices.voices, n) if n == 2 else (Config().voices.voices,):
                    print(f"{args.half}, {title}, {n}:", end=" ")
                    measure(people, babble, condition, most, args, decoder, peer)
    decoder.close()


if __name__ == "__main__":
    main()
