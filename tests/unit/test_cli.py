"""A mistake on the command line is one line and its exit code."""

import errno
import socket

import fsspec
import pyarrow.fs as pafs
import pytest

from vaemo import cli, files
from vaemo.commands import COMMANDS
from vaemo.errors import LabelError, ReadCheckpointError, UsageError


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.data_path("runs/a") == str(tmp_path / "runs/a")
    assert cli.data_path("s3://bucket/a") == "s3://bucket/a"
    monkeypatch.setenv("HOME", "/home/ann")
    assert cli.data_path("~/a") == "/home/ann/a"
    (tmp_path / "~").mkdir()
    assert cli.data_path("~/a") == str(tmp_path / "~/a")
    with pytest.raises(UsageError, match="a path is empty"):
        cli.data_path("")


def test_a_relative_path_in_a_ray_job_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match=r'Give the absolute path, "\$PWD/runs/a"'):
        cli.data_path("runs/a")
    assert cli.data_path("/runs/a") == "/runs/a"


def test_a_mistake_begins_with_the_command(capsys):
    def main(_):
        raise UsageError("no such key")

    with pytest.raises(SystemExit):
        cli.run(main, "python -m vaemo.corpora")
    assert capsys.readouterr().err == "python -m vaemo.corpora: no such key\n"


@pytest.mark.parametrize(
    ("outcome", "code"), [(None, 0), (0, 0), (1, 1), (LabelError("no labels"), 1), (UsageError("no such key"), 2)]
)
def test_exit_codes(outcome, code, capsys):
    def main(_):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == code
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == isinstance(outcome, Exception)
    if isinstance(outcome, Exception):
        assert str(outcome) in printed


def test_a_full_disk_is_one_line(capsys):
    def main(_):
        raise OSError(errno.ENOSPC, "No space left on device", "/out/a.parquet")

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == 1
    printed = capsys.readouterr().err
    assert "storage failed: [Errno 28] No space left on device: '/out/a.parquet'. No file is half written" in printed
    assert len(printed.splitlines()) == 1


def at_storage():
    raise PermissionError(errno.EACCES, "Permission denied", "/out/a")


def without_a_number():
    """As pyarrow raises what an object store says."""
    pafs.PyFileSystem(pafs.FSSpecHandler(Refusing())).get_file_info("a")


class Refusing(fsspec.AbstractFileSystem):
    def info(self, path, **_):
        raise OSError("AWS Error NETWORK_CONNECTION during HeadObject")


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (at_storage, "storage failed: [Errno 13] Permission denied: '/out/a'"),
        (without_a_number, "storage failed: AWS Error NETWORK_CONNECTION"),
        (
            lambda: socket.create_connection(("127.0.0.1", 1)),
            "a connection to another process or machine failed: [Errno",
        ),
        (lambda: (_ for _ in ()).throw(TimeoutError("timed out")), "machine failed: timed out"),
        (lambda: (_ for _ in ()).throw(BrokenPipeError()), "machine failed: BrokenPipeError"),
    ],
)
def test_only_what_storage_says_is_called_so(act, says, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda _: act())
    assert exit_.value.code == 1
    printed = capsys.readouterr().err
    assert says in printed
    assert len(printed.splitlines()) == 1


def test_an_error_of_the_system_that_nobody_expects_stays_a_traceback():
    for error in (OSError("AF_UNIX path length cannot exceed 107 bytes"), OSError(errno.ENOMEM, "Cannot allocate")):
        with pytest.raises(OSError, match=str(error.args[-1])):
            cli.run(lambda _, error=error: (_ for _ in ()).throw(error))


def test_an_unknown_argument_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.JobParser("Do it.").parse_args(["--nope"])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert "unrecognized arguments: --nope" in printed
    assert len(printed.splitlines()) == 1


def test_help_names_the_defaults_that_there_are():
    parser = cli.JobParser("Do it.")
    parser.add_argument("--limit", help="only so many")
    parser.add_argument("--top", default=500, help="draw so many")
    shown = " ".join(parser.format_help().split())
    assert "draw so many (default: 500)" in shown
    assert shown.count("(default: ") == 2  # and that of --config


@pytest.mark.parametrize("text", ["0", "-3", "2.5", "all", ""])
def test_what_counts_nothing_is_one_line(text, capsys):
    parser = cli.JobParser("Do it.")
    parser.add_argument("--limit", type=cli.count)
    assert parser.parse_args(["--limit", "3"]).limit == 3
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args([f"--limit={text}"])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert f"argument --limit: '{text}' is not a whole number of at least 1" in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("name", ["extract", "score"])
def test_a_limit_of_nothing_is_refused(name, capsys):
    with pytest.raises(SystemExit) as refused:
        COMMANDS[name](["--limit", "0"], name)
    assert refused.value.code == 2
    said = f"{name}: argument --limit: '0' is not a whole number of at least 1. See {name} --help.\n"
    assert capsys.readouterr().err == said


def checkpoints(*arguments, several=True):
    parser = cli.JobParser("Do it.")
    cli.add_checkpoint(parser, "a model", several=several)
    return parser.parse_args([part for text in arguments for part in ("--checkpoint", text)]).checkpoint


def test_a_checkpoint_whose_path_holds_commas_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b, plain = "runs/lr=0.1,d_c=16/best", "runs/lr=0.1,d_c=32/best", "runs/plain"
    # A part of the path is there as well.
    for name in (a, b, plain, "runs/lr=0.1"):
        (tmp_path / name).mkdir(parents=True)
    at = str(tmp_path)
    assert checkpoints(a) == (f"{at}/{a}",)
    assert checkpoints(f"{a},{b}") == (f"{at}/{a}", f"{at}/{b}")
    assert checkpoints(f"{plain},{at}/{b},{plain}") == (f"{at}/{plain}", f"{at}/{b}", f"{at}/{plain}")
    assert checkpoints(a, f"{plain},{b}", plain) == tuple(f"{at}/{name}" for name in (a, plain, b, plain))
    assert checkpoints("runs/missing") == (f"{at}/runs/missing",)
    for text, part in ((f"{plain},runs/x=1", "runs/x=1"), ("runs/x=1,d=2/best", "runs/x=1"), (f"{plain},", "")):
        with pytest.raises(
            ReadCheckpointError, match=rf"neither this exists, nor '{part}' of it. Give the option once"
        ):
            checkpoints(text)


def test_checkpoints_at_uris(tmp_path):
    uris = [f"memory://bucket/{name}" for name in ("lr=0.1,d_c=16/best", "plain/best")]
    for uri in uris:
        files.write_whole(f"{uri}/model.safetensors", b"x")
    assert checkpoints(",".join(uris)) == tuple(uris)
    assert checkpoints(*uris) == tuple(uris)


def test_where_one_checkpoint_is_taken_a_second_is_refused(tmp_path, capsys):
    (tmp_path / "a,b").mkdir()
    assert checkpoints(f"{tmp_path}/a,b", several=False) == f"{tmp_path}/a,b"
    with pytest.raises(SystemExit) as exit_:
        checkpoints("a", "b", several=False)
    assert exit_.value.code == 2
    assert "argument --checkpoint: one checkpoint is taken here, and 'b' is another" in capsys.readouterr().err


def test_config_and_overrides():
    args = cli.JobParser("Do it.").parse_args(["--config", "seed", "--set", "model.d_c=8", "--set", "train.window=5"])
    config = cli.load_config(args)
    assert (config.model.d_c, config.train.window, config.model.updater) == (8, 5, "mamba")
