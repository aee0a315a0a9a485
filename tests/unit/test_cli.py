"""A mistake on the command line is one line and its exit code."""

import pytest

from vaemo import cli
from vaemo.errors import LabelError, UsageError


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.data_path("runs/a") == str(tmp_path / "runs/a")
    assert cli.data_path("s3://bucket/a") == "s3://bucket/a"


def test_a_relative_path_in_a_ray_job_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UsageError, match=r'Give the absolute path, "\$PWD/runs/a"'):
        cli.data_path("runs/a")
    assert cli.data_path("/runs/a") == "/runs/a"


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


def test_an_unknown_argument_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.JobParser("Do it.").parse_args(["--nope"])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert "unrecognized arguments: --nope" in printed
    assert len(printed.splitlines()) == 1


def test_config_and_overrides():
    args = cli.JobParser("Do it.").parse_args(["--config", "seed", "--set", "model.d_c=8", "--set", "train.window=5"])
    config = cli.load_config(args)
    assert (config.model.d_c, config.train.window, config.model.updater) == (8, 5, "mamba")
