"""The main job on an archive as one finds them: every file is scored, or listed with a true reason."""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from commands import run_job
from dirty_archive import write_archive
from processes import kill_job, start_job
from scoring_cases import make_audio_checkpoint
from speech_cases import overlap

import vaemo
from vaemo.config import Config, FeatureConfig
from vaemo.errors import TooManyFailuresError
from vaemo.report.write import write_report
from vaemo.scores import read_sessions, read_utterances
from vaemo.store import FeatureStore

QUICK = {
    "features": {"prosody": "none"},
    "extract": {"max_failed_fraction": 1.0},
    "score": {"max_failed_fraction": 1.0},
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("dirty") / "archive")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_audio_checkpoint(tmp_path_factory.mktemp("model") / "best", features=FeatureConfig(prosody="none"))


def score(archive, checkpoint, out, config):
    where = {"input": archive.folder, "checkpoint": checkpoint, "out": out}
    return vaemo.score(**where, config=config, roles_unknown=True, executor="process")


def check(rows: pa.Table, archive) -> None:
    """Every file is there once, the calls are heard where they speak, the others have their status and a reason."""
    assert set(rows["session_id"].to_pylist()) == archive.calls.keys() | archive.others.keys()
    assert len(rows["utt_id"].unique()) == rows.num_rows
    for name, channels in archive.calls.items():
        call = rows.filter(pc.equal(rows["session_id"], name)).to_pylist()
        assert {row["status"] for row in call} == {"ok"}, name
        spoken = archive.turns if channels == 2 else [(0, start_s, end_s) for _, start_s, end_s in archive.turns]
        found = [(row["channel"], row["start_s"], row["end_s"]) for row in call]
        heard, precise = overlap(found, spoken, channels)
        assert heard > 0.95, name
        assert precise > 0.8, name
    for name, status in archive.others.items():
        (row,) = rows.filter(pc.equal(rows["session_id"], name)).to_pylist()
        assert (row["status"], row["start_s"]) == (status, None), (name, row["reason"])
        assert row["reason"]
        for word in ("Errno", "Traceback", "/tmp", "numpy", "0x", "vaemo-"):
            assert word not in row["reason"], (name, row["reason"])
    twins = rows.filter(pc.equal(rows["status"], "duplicate"))
    assert dict(zip(twins["session_id"].to_pylist(), twins["duplicate_of"].to_pylist(), strict=True)) == archive.twins


def test_every_file_is_scored_or_listed(archive, checkpoint, tmp_path, capsys):
    config = Config().replace(QUICK)
    outcome = score(archive, checkpoint, tmp_path / "out", config)
    check(read_utterances(str(tmp_path / "out")), archive)
    told = capsys.readouterr().out
    assert told.count(f"passed over {archive.passed_over} files") == 1
    assert outcome.sessions["all"] == len(archive.calls) + len(archive.others)
    assert outcome.sessions["silent"] == list(archive.others.values()).count("silent")
    # One line for each kind of problem, with one of its files.
    for status in {*archive.others.values()} - {"silent"}:
        assert told.count(f"  {status:<12} such as ") == 1

    strict = config.replace({"score": {"max_failed_fraction": 0.05}})
    with pytest.raises(TooManyFailuresError, match=r"(sessions|utterances) failed"):
        score(archive, checkpoint, tmp_path / "out", strict)
    assert "nothing to do: all" in capsys.readouterr().out

    counts = write_report(str(tmp_path / "out"), str(tmp_path / "report"), config, audio=str(archive.folder))
    assert counts["with_audio"] == counts["drawn"] == outcome.sessions["all"]
    assert read_sessions(str(tmp_path / "out")).num_rows == outcome.sessions["all"]


def test_every_file_is_extracted_or_listed(archive, tmp_path):
    config = Config().replace(QUICK)
    outcome = vaemo.extract(input=archive.folder, out=tmp_path / "store", config=config, executor="process")
    check(FeatureStore.open(str(tmp_path / "store")).read(), archive)
    assert outcome.sessions["all"] == len(archive.calls) + len(archive.others)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("job", ["score", "extract"])
def test_killed_once_and_run_again(job, archive, checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ["--input", archive.folder, "--out", out, "--set", "extract.shard_recordings=4"]
    options += ["--set", f"{job}.max_failed_fraction=1", "--set", "features.prosody=none"]
    options += ["--checkpoint", checkpoint, "--roles-unknown"] if job == "score" else []
    parts = out / "utterances" if job == "score" else out
    kill_job(start_job(job, *options), lambda: len(list(parts.glob("*.parquet"))) > 3)
    done = run_job(job, *options)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = read_utterances(str(out)) if job == "score" else FeatureStore.open(str(out)).read()
    check(rows, archive)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["exit_code"] == 0
    assert summary["sessions"]["all"] == len(archive.calls) + len(archive.others)
