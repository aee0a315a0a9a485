"""The examples in the docstrings of the public names run, and give what they show."""

import doctest
import json

import numpy as np
import pytest
import soundfile
from speech_cases import call

import vaemo
from vaemo import progress

IN_ORDER = ("extract", "train", "score", "evaluate", "Stream", "LiveSession")
"""Each works on what those before it leave."""
OTHERS = sorted(set(vaemo.__all__) - {*IN_ORDER, "__version__"})


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A working directory with `calls.jsonl` (six recordings of noise) and `call.wav`; jobs print nothing."""
    rng = np.random.default_rng(0)
    rows = []
    (tmp_path / "calls").mkdir()
    for session, split in enumerate(["train"] * 4 + ["dev", "test"]):
        soundfile.write(tmp_path / "calls" / f"{session}.wav", rng.normal(scale=0.1, size=2 * 8000), 8000)
        for start_s in (0, 1):
            rows.append(
                {
                    "utt_id": f"{session}-{start_s}",
                    "session_id": f"s{session}",
                    "speaker_id": f"p{session}",
                    "audio_path": f"calls/{session}.wav",
                    "start_s": start_s,
                    "end_s": start_s + 1,
                    "valence": rng.random(),
                    "arousal": rng.random(),
                    "split": split,
                }
            )
    (tmp_path / "calls.jsonl").write_text("\n".join(map(json.dumps, rows)))
    speech, _ = call(2)
    soundfile.write(tmp_path / "call.wav", speech.sum(axis=0), 16_000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "print", lambda *args, **kwargs: None, raising=False)


def run_examples(name):
    names = {"vaemo": vaemo, "soundfile": soundfile}
    found = doctest.DocTestFinder(recurse=False).find(getattr(vaemo, name), name, extraglobs=names)
    assert sum(len(test.examples) for test in found), f"vaemo.{name} has no example"
    runner = doctest.DebugRunner(optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test)


def test_examples_of_the_jobs_and_of_streams(calls):
    for name in IN_ORDER:
        run_examples(name)


@pytest.mark.parametrize("name", OTHERS)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(name)
