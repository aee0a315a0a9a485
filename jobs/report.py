#!/usr/bin/env python3
"""Scores to a page that opens from disk, and pictures."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser("Make index.html, which shows every call and the archive as a whole, and PNG pictures.")
    path = cli.data_path
    parser.add_argument("--scores", type=path, required=True, metavar="SCORES", help="folder that jobs/score.py wrote")
    parser.add_argument("--labels", type=path, metavar="STORE|MANIFEST", help="draw these labels beside the scores")
    parser.add_argument("--audio", type=path, metavar="FOLDER", help="link the recordings: click a point to hear it")
    parser.add_argument("--top", type=cli.count, default=500, metavar="N", help="draw N calls where there are more")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="index.html and pictures/ go here")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.report.write import write_report

    with cli.summary(args.out):
        counts = write_report(args.scores, args.out, config, labels=args.labels, audio=args.audio, top=args.top)
        print(f"{counts['calls']:,} calls, {counts['drawn']:,} drawn: open {args.out}/index.html", flush=True)


if __name__ == "__main__":
    cli.run(main)
