"""The commands that maintain a folder of scores: `python -m vaemo.scores erase`, `python -m vaemo.scores compact`."""

from __future__ import annotations

import argparse
from datetime import date

from vaemo import cli, files
from vaemo.errors import UsageError
from vaemo.progress import say
from vaemo.scoring.calls import read_calls
from vaemo.scoring.compact import TARGET_BYTES, compact
from vaemo.scoring.erase import erase_sessions
from vaemo.scoring.ids import IdKey

PROG = "python -m vaemo.scores"
_MB = 1_000_000
_SHOWN = 5
_TABLES = (".parquet", ".csv", ".tsv", ".jsonl")


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """The command `python -m vaemo.scores`."""
    parser = cli.Parser(prog=prog or PROG, description="Maintain a folder of scores.")
    commands = parser.add_subparsers(required=True)
    _add_erase(commands.add_parser("erase", help="remove calls and leave tombstones"))
    joining = commands.add_parser("compact", help="join small parts into few files")
    joining.add_argument("--scores", required=True, metavar="SCORES", help="the folder of scores")
    joining.add_argument(
        "--target-mb", type=cli.count, default=TARGET_BYTES // _MB, help="size of a joined file, in MB of 10^6 bytes"
    )
    joining.set_defaults(command=_compact)
    args = parser.parse_args(argv)
    args.command(args)


def _add_erase(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--session", action="append", default=[], metavar="ID", help="a call; may be repeated")
    parser.add_argument(
        "--sessions", metavar="FILE", help="calls: a text of one id a line, or a table (Parquet, CSV, JSON Lines)"
    )
    parser.add_argument("--before", type=_day, metavar="DATE", help="all calls dated before this day, as 2026-11-23")
    parser.add_argument("--scores", required=True, metavar="SCORES", help="the folder of scores")
    for name, what in (
        ("store", "feature store"),
        ("run", "folder of a training, a sweep or an ablation"),
        ("report", "report"),
        ("personal", "folder of personal deltas"),
    ):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="DIR", dest=f"{name}s", help=f"a {what}; may be repeated"
        )
    parser.add_argument("--speakers", action="append", default=[], metavar="FILE", help="enrolments; may be repeated")
    parser.set_defaults(command=_erase)


def _erase(args: argparse.Namespace) -> None:
    key = IdKey.from_environment("the tombstone of an erased call")
    for path in (args.scores, *args.stores, *args.runs, *args.speakers, *args.reports, *args.personals):
        if not files.exists(path):
            raise UsageError(f"{path} does not exist, so nothing was erased. Correct the path.")
    session_ids = [*args.session, *(_read_ids(args.sessions) if args.sessions else ())]
    if not all(map(str.strip, args.session)):
        raise UsageError("--session is empty; give the id of a call.")
    if not session_ids and args.before is None:
        raise UsageError("no call is named: give --session ID, --sessions FILE or --before DATE.")
    removed, trained, missing = erase_sessions(
        session_ids,
        key,
        scores=args.scores,
        before=args.before,
        stores=args.stores,
        runs=args.runs,
        speakers=args.speakers,
        reports=args.reports,
        personal=args.personals,
    )
    told = [*session_ids[:_SHOWN], *(["..."] if len(session_ids) > _SHOWN else [])]
    told += [f"what is dated before {args.before}"] if args.before else []
    say(f"{', '.join(told)}: " + ", ".join(f"{count} from {kind}" for kind, count in removed.items()))
    if missing:
        shown = ", ".join(f"'{name}'" for name in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
        say(f"warning: no row is of a call {shown}{more}. Tombstones stay: should it come, it is left out.")
    for checkpoint in trained:
        say(f"warning: {checkpoint} was trained on what was erased, and its weights stay. Train it again.")


def _compact(args: argparse.Namespace) -> None:
    before, after = compact(args.scores, args.target_mb * _MB)
    say(f"{args.scores}: {before:,} parts are {after:,} now" if after < before else f"{args.scores}: nothing to join")


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no day such as 2026-11-23") from None


def _read_ids(path: str) -> list[str]:
    if path.lower().removesuffix(".gz").endswith(_TABLES):
        return read_calls(path).session_ids
    content = files.read_bytes(path)
    # With the mark that editors put in front of UTF-16 and UTF-8: it is of no id.
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return [line.strip() for line in content.decode(encoding).splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UsageError(f"--sessions {path} is not text in UTF-8. Save it so, with one id a line.") from None


if __name__ == "__main__":
    cli.run(main, PROG)
