"""Measures how well voices are told apart in mono calls, and what of the other person is scored as the customer.

    python tests/perf/voices.py --emodb FOLDER --prompts /usr/share/asterisk/sounds --calls 6 --seconds 90

Emo-DB gives pairs of one language and sex; Debian's packages asterisk-core-sounds-{en,es,fr,it}-wav and
asterisk-prompt-{fr-armelle,it-menardi-wav,es-co} give calm voices. Errors are those of `pyannote.metrics`. The peer is
senko's own diariser on silero's activity. Prints a table, one line a set and condition.
"""

import argparse
import functools
import itertools
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from mono_calls import CONDITIONS, RATE, Voice, emodb, make_call, prompts, write_call
from pyannote.core import Annotation, Segment, Timeline
from pyannote.metrics.diarization import DiarizationErrorRate, JaccardErrorRate

from vaemo.audio.recording import Decoder
from vaemo.config import Config
from vaemo.data.speakers import unit
from vaemo.features.campplus import CampPlus, embed
from vaemo.utterances import Parties, extract_recording
from vaemo.voices.prints import Voiceprints
from vaemo.voices.roles import Evidence, roles_of_voices

MARGINS = (0.15, 0.2, 0.25)
ENROLLED_CLIPS = 10
PROMPT_SETS = {
    2: (("fr", "fr_CA_f_June"), ("es", "es_MX_f_Allison"), ("it_IT_f_Menardi", "it_IT_m_Carlo")),
    3: (("fr", "fr_CA_f_June", "it_IT_f_Menardi"), ("es", "es_MX_f_Allison", "it_IT_f_Menardi")),
}
TWO_LANGUAGES = (("en_US_f_Allison", "fr_CA_f_June"), ("es", "fr"), ("it_IT_f_Menardi", "es_MX_f_Allison"))


def annotation(turns):
    held = Annotation()
    for n, (start, end, who) in enumerate(turns):
        held[Segment(start, end), n] = who
    return held


def split(voice):
    """Clips for enrolment, and a voice of the others."""
    return voice.clips[:ENROLLED_CLIPS], Voice(voice.name, voice.language, voice.sex, voice.clips[ENROLLED_CLIPS:])


def enrolled(name, clips):
    """Voiceprint as `vaemo enrol` makes it of such clips."""
    samples = np.concatenate([torchaudio.functional.resample(torch.from_numpy(c), RATE, 16000).numpy() for c in clips])
    windows = samples[: len(samples) // 24000 * 24000].reshape(-1, 24000)
    vector = unit(embed(windows).sum(axis=0))
    return Voiceprints([name], ["agent"], [None], [len(samples) / 16000], vector[None], CampPlus.made_by)


@functools.cache
def prints_of(voice):
    return enrolled(voice.name, voice.clips[:ENROLLED_CLIPS])


class Senko:
    """The peer: its own windows, clusters and merging, on one core."""

    def __init__(self):
        import senko

        self._diarizer = senko.Diarizer(device="cpu", vad="silero", warmup=False, quiet=True)

    def __call__(self, path):
        samples, rate = soundfile.read(path, dtype="float32")
        samples = torchaudio.functional.resample(torch.from_numpy(samples), rate, 16000).numpy()
        found = self._diarizer.diarize_samples(np.clip(samples, -1, 1))
        torch.set_num_threads(1)
        return [(s["start"], s["end"], s["speaker"]) for s in (found or {"merged_segments": []})["merged_segments"]]


def measure(sets, babble, condition, args, decoder, peer):
    config = Config().replace({"voices": {"mode": "diarize"}})
    metrics = {
        (who, collar): DiarizationErrorRate(collar=collar) for who in ("vaemo", "senko") for collar in (0.0, 0.5)
    }
    jer = JaccardErrorRate()
    true, wrong, swept = [], [], {least: np.zeros(2) for least in MARGINS}
    right, calls, cpu_s, audio_s = 0, 0, 0.0, 0.0
    scored, other, asked, decided, unenrolled_scored = 0.0, 0.0, 0.0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number, voices in enumerate(itertools.islice(itertools.cycle(sets), args.calls)):
            held, agent = split(voices[0])
            people = [agent, *voices[1:]]
            strangers = [voice for voice in babble if voice.name not in {v.name for v in voices}][:5]
            name = f"{condition}-{len(voices)}-{number}"
            call = make_call(name, people, number, seconds=args.seconds, condition=condition, babble=strangers)
            path = write_call(call, Path(folder), condition)
            prints, seen = enrolled(agent.name, held), []

            agent_known = Evidence(agent_id=agent.name)

            def roles(found, lines, evidence=agent_known, prints=prints, seen=seen):
                seen.append((found, lines))
                return roles_of_voices(found, lines, evidence, prints, config.voices)

            began = time.process_time()
            rows = extract_recording(str(path), name, extractors={}, config=config, decoder=decoder,
                                     parties=Parties(roles_of_voices=roles, verifies=True))  # fmt: skip
            cpu_s += time.process_time() - began
            held_rows = [row for row in rows.to_pylist() if row["start_s"] is not None]
            true.append(likeness(seen[0][0], prints))
            for stranger in [voice for voice in strangers if voice.sex == agent.sex] if len(voices) == 2 else []:
                # The agent is not enrolled, and somebody else is named.
                found = roles(*seen[0], Evidence(agent_id=stranger.name), prints_of(stranger))
                wrong.append(likeness(seen[0][0], prints_of(stranger)))
                unenrolled_scored += any(role.role == "customer" for role in found.values())
                calls += 1
            audio_s += len(call.samples) / RATE
            reference = annotation([(t.start_s, t.end_s, t.speaker) for t in call.turns])
            whole = Timeline([Segment(0.0, len(call.samples) / RATE)])
            found = annotation([(r["start_s"], r["end_s"], str(r["voice"])) for r in held_rows])
            theirs = annotation(peer(path)) if peer and path.suffix == ".wav" else None
            for (who, _), metric in metrics.items():
                if who == "vaemo" or theirs is not None:
                    metric(reference, found if who == "vaemo" else theirs, uem=whole)
            jer(reference, found, uem=whole)
            right += len({r["voice"] for r in held_rows}) == len(voices)
            if len(voices) == 2:
                customers = [r for r in held_rows if r["role"] == "customer"]
                decided += bool(customers)
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
    line = f"{condition:7s} n={n} right {right}/{n}"
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
    if asked:
        line += " | by margin " + ", ".join(
            f"{least:.2f}: {other_s:.1f} of {all_s:.0f} s" for least, (all_s, other_s) in swept.items()
        )
        shown = [[f"{best:.2f} by {margin:.2f}" for best, margin in sorted(held)] for held in (true, wrong)]
        line += f" | likeness of agents {', '.join(shown[0][:4])}, ...; of strangers ..., {', '.join(shown[1][-4:])}"
    print(line + f" | {audio_s / max(cpu_s, 1e-9):.0f} x real time", flush=True)


def likeness(voices, prints):
    """How much the voice that is most like an enrolled one is like it, and by how much more than the next."""
    found = sorted((float(voice.vector @ prints.vectors[0]) for voice in voices), reverse=True)
    return found[0], found[0] - found[1] if len(found) > 1 else 0.0


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emodb", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--calls", type=int, default=6, help="calls of a set and condition")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--voices", type=int, nargs="*", default=[2, 1, 3])
    parser.add_argument("--conditions", nargs="*", default=CONDITIONS)
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    decoder, peer = Decoder(120), None if args.no_peer else Senko()
    for n, condition in itertools.product(args.voices, args.conditions):
        if args.emodb:
            known = emodb(args.emodb)
            sexes = [[v for v in known.values() if v.sex == sex] for sex in "mf"]
            # One of either sex in turn, so that few calls meet many persons.
            sets = [s for both in zip(*(itertools.combinations(g, n) for g in sexes), strict=True) for s in both]
            sets = sets[:: max(len(sets) // args.calls, 1)]
            print(f"Emo-DB, {n} of one sex:", end=" ")
            measure(sets, list(known.values()), condition, args, decoder, peer)
        if args.prompts:
            known = prompts(args.prompts)
            names = [(name,) for name in known] if n == 1 else PROMPT_SETS[n]
            print(f"prompts, {n}:", end=" ")
            measure(
                [[known[x] for x in names_] for names_ in names], list(known.values()), condition, args, decoder, peer
            )
            if n == 2:
                print("prompts, 2 of two languages:", end=" ")
                sets = [[known[x] for x in names_] for names_ in TWO_LANGUAGES]
                measure(sets, list(known.values()), condition, args, decoder, peer)
    decoder.close()


if __name__ == "__main__":
    main()
