"""Shared by all commands: arguments, one-line errors, and the exit codes 0, 1 and 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vaemo import files
from vaemo.config import PRESETS, Config
from vaemo.errors import ReadCheckpointError, UsageError, VaemoError, mistake_of
from vaemo.summary import summary as summary


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, without the usage block."""
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


class JobParser(Parser):
    """A parser with the options of all jobs: `--config` and `--set`."""

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=_HelpFormatter)
        self.add_argument("--config", default="default", help=f"YAML file, or one of {', '.join(PRESETS)}")
        self.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SECTION.KEY=VALUE",
            dest="overrides",
            help="change one field of the config; may be repeated",
        )


def add_checkpoint(parser: argparse.ArgumentParser, help: str, *, required: bool = True, several: bool = False) -> None:
    """Give a parser `--checkpoint`.

    Args:
        parser: Of a job.
        help: What the checkpoint is for.
        required: Whether it must be given.
        several: Whether it may be repeated, or hold several folders with commas between them; a tuple then.
    """
    shown = "DIR[,DIR...]" if several else "DIR"
    parser.add_argument("--checkpoint", action=_Checkpoint, const=several, required=required, metavar=shown, help=help)


class _Checkpoint(argparse.Action):
    """Folders of checkpoints, at most one unless `const` allows several."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, text: Any, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if self.const:
            setattr(namespace, self.dest, (*(before or ()), *_folders(text)))
        elif before is None:
            setattr(namespace, self.dest, data_path(text))
        else:
            raise argparse.ArgumentError(self, f"one checkpoint is taken here, and '{text}' is another")


def _folders(text: str) -> list[str]:
    """The folders that a text names: itself, or several with commas between them, which may hold commas too.

    Raises:
        ReadCheckpointError: if a folder does not exist.
    """
    if "," not in text or files.exists(data_path(text)):
        return [data_path(text)]
    parts, found = text.split(","), []
    while parts:
        # The longest first: an existing folder `a,b` takes precedence over `a`.
        lengths = (n for n in range(len(parts), 0, -1) if parts[0] and files.exists(data_path(",".join(parts[:n]))))
        if not (length := next(lengths, 0)):
            raise ReadCheckpointError(
                f"--checkpoint {text}: neither this exists, nor '{parts[0]}' of it. Give the option once for each "
                "checkpoint."
            )
        found.append(data_path(",".join(parts[:length])))
        parts = parts[length:]
    return found


def load_config(args: argparse.Namespace) -> Config:
    """The config that `--config` and `--set` ask for."""
    return Config.load(args.config, args.overrides)


def keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a job as keywords of the function that does it: `config` is loaded, `--set` is in it."""
    given = {name: value for name, value in vars(args).items() if name != "overrides"}
    return {**given, "config": load_config(args)}


def names(text: str) -> list[str]:
    """The type of an argument that lists names with commas between them."""
    return [name for part in text.split(",") if (name := part.strip())]


def data_path(text: str) -> str:
    """The type of an argument that names data: absolute, or a URI; `~/` is the home folder.

    Raises:
        UsageError: for empty text, as an unset variable of a shell gives it, which would mean the working directory;
            for a relative path inside a Ray job, which runs in a temporary copy of the working directory: its output
            would be lost, and its input is not there.
    """
    if not text.strip():
        raise UsageError("a path is empty; give the path of a file or a folder, '.' for the working directory.")
    if files.is_uri(text):
        return text
    if text.startswith("~/") and not os.path.lexists("~"):
        # A shell does not always do it, Python never: there would be a folder of that name.
        text = os.path.expanduser(text)
    if not os.path.isabs(text) and in_ray_job():
        raise UsageError(
            f"'{text}' is a relative path, and a Ray job runs in a temporary copy of the working directory. "
            f'Give the absolute path, "$PWD/{text}", on storage that every node sees, or a URI.'
        )
    return os.path.abspath(text)


def count(text: str) -> int:
    """The type of an argument that counts: a whole number, at least 1."""
    # A UsageError would lose the argument's name.
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def add_rerun_options(parser: argparse.ArgumentParser) -> None:
    """The options of jobs that read recordings: what to leave out, and what to do again."""
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave out recordings of that name or relative path; may be repeated",
    )
    parser.add_argument(
        "--voices-from",
        type=data_path,
        metavar="PATH",
        help="who speaks when: RTTM, or JSON of WhisperX or Amazon Transcribe, a file or a folder of them",
    )
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed in an earlier run")
    parser.add_argument(
        "--changed",
        choices=("keep", "redo"),
        default="keep",
        help="what to do with finished sessions whose input has changed since: list them, or do them again",
    )


def in_ray_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def run(main: Callable[[list[str] | None], int | None], prog: str | None = None) -> NoReturn:
    """Call a job's `main`; errors that the user can correct become one line and an exit code, others stay tracebacks.

    Errors of disks, object stores and connections count as the former: see `vaemo.errors.mistake_of`.

    Args:
        main: Takes the arguments, and returns an exit code if it is not 0.
        prog: Name at the start of the line; None is that of the script.
    """
    try:
        code = main(None)
    except (VaemoError, OSError) as error:
        mistake = mistake_of(error)
        if mistake is None:
            raise
        print(f"{prog or os.path.basename(sys.argv[0])}: {mistake}", file=sys.stderr, flush=True)
        sys.exit(mistake.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)
