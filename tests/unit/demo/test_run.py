"""What the demonstration says at its end: how much speech was found, the table, and who it refuses to overwrite."""

import numpy as np
import pyarrow as pa
import pytest

from vaemo.config import Config
from vaemo.demo import run
from vaemo.errors import OtherRunError
from vaemo.metrics import ccc


def spans(rows):
    return pa.table(dict(zip(("session_id", "channel", "start_s", "end_s"), zip(*rows, strict=True), strict=True)))


def test_speech_found_counts_seconds_by_recording_and_channel():
    truth = spans([("a", 0, 1.0, 3.0), ("a", 1, 4.0, 5.0), ("b", 0, 0.0, 1.0)])
    # 1.5 of 2 s, none of the second channel, all of b and half a second too much.
    found = spans([("a", 0, 1.5, 3.0), ("b", 0, 0.0, 1.5)])
    share_found, share_speech = run.speech_found(truth, found)
    assert share_found == pytest.approx(2.5 / 4, abs=0.01)
    assert share_speech == pytest.approx(2.5 / 3, abs=0.01)


def test_speech_on_the_wrong_channel_is_not_found():
    truth, found = spans([("a", 0, 1.0, 3.0)]), spans([("a", 1, 1.0, 3.0)])
    assert run.speech_found(truth, found) == (0.0, 0.0)


def test_recordings_are_judged_by_who_speaks_meanwhile():
    """Utterances found late by a third, an agent's speech and a found noise beside them."""
    rng = np.random.default_rng(0)
    felt = rng.random((30, 2))
    truth, found = [], []
    for i, (valence, arousal) in enumerate(felt):
        place = {"session_id": f"call-{i % 3}", "channel": 0, "start_s": 3.0 * i, "end_s": 3.0 * i + 2}
        truth.append({**place, "valence": valence, "arousal": arousal})
        truth.append({**place, "channel": 1, "valence": 0.5, "arousal": 0.5})
        moved = {"start_s": 3.0 * i + 0.7, "end_s": 3.0 * i + 2.7}
        found.append({**place, **moved, "valence": valence, "arousal": 0.5 + (arousal - 0.5) / 2})
        found.append({**place, **moved, "channel": 1, "valence": None, "arousal": None})
    found.append({"session_id": "call-0", "channel": 0, "start_s": 500.0, "end_s": 501.0, "valence": 0, "arousal": 0})
    values = run.recordings_ccc(pa.Table.from_pylist(truth), pa.Table.from_pylist(found))
    assert values[0] == pytest.approx(1.0)
    assert values[1] == pytest.approx(ccc(0.5 + (felt[:, 1] - 0.5) / 2, felt[:, 1]))


def test_the_mean_predictor_is_near_zero(tmp_path):
    lines, rng = [], np.random.default_rng(0)
    for i in range(200):
        split = "train" if i < 120 else "test"
        valence, arousal = rng.random(2)
        lines.append(
            f'{{"utt_id": "{i}", "session_id": "s{i % 20}{split}", "speaker_id": "p", "audio_path": "a.wav", '
            f'"split": "{split}", "valence": {valence}, "arousal": {arousal}}}'
        )
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(lines))
    values = run.mean_predictor(str(path))
    assert values["ccc_avg"] == [pytest.approx(0.0, abs=1e-12)]
    # The deviation of a uniform variable.
    assert values["rmse_avg"] == [pytest.approx(12**-0.5, abs=0.03)]


def test_the_table_gives_mean_and_spread():
    values = {name: [0.7, 0.8, 0.9] for name in run.TABLE_METRICS}
    summary = {
        "seeds": [0, 1, 2],
        "models": {"vaemo": values, "no-memory": values, "mean": {name: [0.0] for name in run.TABLE_METRICS}},
        "compare": {"difference": 0.25, "ci95": [0.2, 0.3]},
        "speech_found": 0.973,
        "found_is_speech": 0.914,
        "recordings_ccc": {"valence": 0.61, "arousal": 0.72},
    }
    text = run.summary_table(summary)
    assert "vaemo                         0.800 ± 0.100" in text
    assert "mean of the training labels   0.000  " in text
    assert "Memory adds 0.250" in text
    assert "97% of the speech was found, 91% of what was found is speech" in text
    assert "CCC is 0.610 (valence) and 0.720 (arousal)" in text


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OtherRunError, match="it is not an output folder of this job"):
        run.run_demo(str(tmp_path), Config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
