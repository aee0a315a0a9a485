"""Small parts are joined: nothing is lost or occurs twice, whenever that is killed; other programs read the folder."""

import functools
import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pytest
from score_rows import make_utterances

from vaemo import files, scores
from vaemo.config import ScoreConfig
from vaemo.errors import OtherRunError, StorageError
from vaemo.parts.index import Entry, Index
from vaemo.parts.lease import lease
from vaemo.parts.shards import session_of, tag_keys
from vaemo.scoring import tend
from vaemo.scoring.compact import compact, end_joining

DAYS = ("date=2026-11-23", "date=2026-11-24")


@pytest.fixture
def folder(tmp_path):
    """Twelve parts of a session each, half of them of either day."""
    out = str(tmp_path / "out")
    files.write_json(files.join(out, scores.PROVENANCE), {"label_range": [0, 1]})
    everything = make_utterances(n_sessions=12)
    for number in range(12):
        rows = everything.filter(pc.equal(everything["session_id"], f"call-{number}"))
        if number % 3 == 0:  # one of another program, or of a job with another column
            rows = rows.append_column("queue", pa.array(["sales"] * len(rows)))
        keys, stamps = [f"call-{number}\tdigest"], {f"call-{number}": [[1, 2, "x"]]}
        name = f"{DAYS[number % 2]}/part-{number:02d}.parquet"
        scores.write_part(out, name, tag_keys(rows, keys, stamps), ScoreConfig())
    return out


def read(out):
    """All rows of both tables, in one order."""
    return [sorted(map(str, rows.to_pylist())) for rows in (scores.read_utterances(out), scores.read_sessions(out))]


def entries(out):
    utterances = files.join(out, scores.UTTERANCES)
    found = Index.open(utterances).entries
    names = [path[len(utterances) + 1 :] for path in files.list_files(utterances, ".parquet", recursive=True)]
    assert found == {name: Entry.of(utterances, name) for name in names}
    return found


def keys(out):
    return sorted(key for entry in entries(out).values() for key in json.loads(entry.keys))


def test_parts_of_a_day_become_one_and_every_key_is_kept(folder):
    before, finished = read(folder), keys(folder)
    assert compact(folder) == (12, 2)
    assert read(folder) == before
    assert keys(folder) == finished
    assert sorted(name.partition("/")[0] for name in entries(folder)) == list(DAYS)
    assert {session_of(name) for name in finished} == {f"call-{number}" for number in range(12)}
    assert compact(folder) == (2, 2)


def test_a_joined_part_is_not_larger_than_the_target(folder):
    sizes = [entry.size for entry in entries(folder).values()]
    before, target = read(folder), 3 * max(sizes)
    _, n = compact(folder, target)
    assert 2 < n < 12
    assert read(folder) == before
    assert compact(folder, min(sizes)) == (n, n)


def until_killed(left, call, path, *rest):
    """Do it, as long as anything is left to be done before the kill."""
    # How often the lease is renewed is not certain.
    if not str(path).endswith("_lease.json"):
        left[0] -= 1
        if left[0] < 0:
            raise StorageError("killed")
    return call(path, *rest)


@pytest.mark.long
def test_it_may_be_killed_anywhere(folder, tmp_path, monkeypatch):
    before, finished = read(folder), keys(folder)
    real = {name: getattr(files, name) for name in ("write_whole", "delete")}
    for step in range(60):
        left = [step]
        for name, call in real.items():
            monkeypatch.setattr(files, name, functools.partial(until_killed, left, call))
        try:
            compact(folder)
            ended = True
        except StorageError:
            ended = False
        for name, call in real.items():
            monkeypatch.setattr(files, name, call)
        assert read(folder) == before, step
        if ended:
            break
        # The next scoring begins so: it finds all of it finished, once.
        end_joining(folder)
        assert keys(folder) == finished, step
        assert read(folder) == before, step
    assert ended
    assert not files.exists(files.join(folder, scores.JOINING))
    assert keys(folder) == finished


def test_other_programs_read_the_folder_as_it_is(folder):
    n = len(read(folder)[0])
    compact(folder)
    found = pyarrow.dataset.dataset(files.join(folder, scores.UTTERANCES), partitioning="hive", format="parquet")
    assert found.count_rows() == n
    one = found.to_table(columns=["session_id"], filter=pc.field("date") == "2026-11-24")
    assert set(one["session_id"].to_pylist()) == {f"call-{number}" for number in range(1, 12, 2)}


def test_the_command(folder, capsys):
    tend.main(["compact", "--scores", folder])
    assert "12 parts are 2 now" in capsys.readouterr().out
    tend.main(["compact", "--scores", folder, "--target-mb", "1"])
    assert "nothing to join" in capsys.readouterr().out


def test_what_is_no_folder_of_scores_or_is_being_written_is_refused(folder, tmp_path):
    with pytest.raises(OtherRunError, match=r"has no _provenance\.json; give a folder that"):
        compact(str(tmp_path / "none"))
    with lease(folder), pytest.raises(OtherRunError, match="is being written by another run"):
        compact(folder)
