"""Every job leaves what became of it for schedulers, beside the results that some jobs leave there."""

import json

import pytest

from vaemo import files
from vaemo.errors import OtherRunError, ReadStoreError, StorageError, TooManyFailuresError, UsageError
from vaemo.parts.tally import Tally, count
from vaemo.summary import results, summary
from vaemo.training.run_folder import finished


def written(folder):
    return json.loads((folder / "summary.json").read_text())


def test_a_job_that_ends_well_says_so(tmp_path):
    with summary(str(tmp_path)) as facts:
        facts |= {"utterances": {"ok": 3}}
    told = written(tmp_path)
    assert (told["exit_code"], told["utterances"]) == (0, {"ok": 3})
    assert told["seconds"] >= 0
    assert "error" not in told


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ReadStoreError("the store is gone"), 1),
        (OSError("disk"), 1),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 1),
        (TooManyFailuresError("5 of 9 failed", {"failed_fraction": 0.5}), 1),
    ],
)
def test_a_job_that_fails_says_how(error, code, tmp_path):
    with pytest.raises(type(error)), summary(str(tmp_path)):
        raise error
    told = written(tmp_path)
    said = {130: "it was interrupted; run the same command again to do the rest"}.get(code, str(error) or "MemoryError")
    assert (told["exit_code"], told["error"]) == (code, said)
    assert told.get("failed_fraction") == (0.5 if isinstance(error, TooManyFailuresError) else None)
    with summary(str(tmp_path)):
        pass
    assert "error" not in written(tmp_path)


def test_what_a_disk_refuses_is_an_error_of_storage(tmp_path):
    with pytest.raises(StorageError, match=r"storage failed: .*File name too long"), summary(str(tmp_path)):
        files.exists(f"{tmp_path}/{'x' * 300}/a")
    assert written(tmp_path)["error"].startswith("storage failed")


def test_nothing_is_written_where_nothing_of_the_job_is(tmp_path):
    with summary(str(tmp_path), dry_run=True):
        pass
    with summary(str(tmp_path / "none")):
        pass
    with pytest.raises(OtherRunError), summary(str(tmp_path)):
        raise OtherRunError("of another run")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_output_folder(tmp_path):
    path = tmp_path / "calls.csv"
    path.write_text("kept")
    with pytest.raises(UsageError, match=r"--out .*calls.csv is a file; give a folder"), summary(str(path)):
        pytest.fail("it was begun")
    assert path.read_text() == "kept"


def test_results_stay_and_a_failed_run_is_not_a_finished_one(tmp_path):
    with pytest.raises(OSError, match="disk"), summary(str(tmp_path)):
        raise OSError("disk")
    assert finished(str(tmp_path)) is None
    files.write_json(tmp_path / "summary.json", {"dev_ccc_avg": 0.5})
    with summary(str(tmp_path)):
        pass
    assert results(str(tmp_path)) == finished(str(tmp_path)) == {"dev_ccc_avg": 0.5}
    assert written(tmp_path)["exit_code"] == 0


def tally_of(statuses):
    import pyarrow as pa

    n = len(statuses)
    table = pa.table(
        {
            "session_id": [f"s{number}" for number in range(n)],
            "utt_id": [f"u{number}" for number in range(n)],
            "status": statuses,
            "reason": [None if status == "ok" else "why" for status in statuses],
            "start_s": [0.0] * n,
            "end_s": [1.0] * n,
        }
    )
    tally = Tally()
    tally.add(count(table))
    return tally


def test_calls_without_speech_are_no_failures(capsys):
    tally = tally_of(["ok"] * 9 + ["silent"])
    tally.check("score", 0.0, 0.5, "")
    tally.say("recordings")
    assert "1  recordings without any speech" in capsys.readouterr().out
    assert tally.to_dict()["failed_fraction"] == 0


def test_an_archive_of_silence_may_be_misread():
    tally_of(["ok"] * 5 + ["silent"] * 14).check("score", 0.0, 0.5, "")
    with pytest.raises(TooManyFailuresError, match=r"14 of 20 sessions hold no speech \(70\.0%\); score\.max_silent"):
        tally_of(["ok"] * 6 + ["silent"] * 14).check("score", 0.0, 0.5, "")


def test_what_has_changed_counts_as_failed(capsys):
    tally = tally_of(["ok"] * 9)
    tally.changed = ["s3"]
    with pytest.raises(TooManyFailuresError, match="1 of 9 sessions failed") as caught:
        tally.check("score", 0.05, 0.5, "")
    assert caught.value.counts["sessions"]["changed"] == 1
    tally.say("recordings")
    assert "1  changed since they were done, and keep their rows: s3" in capsys.readouterr().out
