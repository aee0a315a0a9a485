#!/usr/bin/env python3
"""Recordings, a manifest or a feature store to scores: valence and arousal of every utterance and every call."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser("Score whole sessions; what is there is kept, running again does what is missing.")
    parser.add_argument(
        "--input", type=cli.data_path, required=True, help="a feature store, a manifest, or a folder of recordings"
    )
    cli.add_checkpoint(parser, "several, or the option repeated, give the mean, and *_sd their deviation", several=True)
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="SCORES", help="the folder of scores")
    parser.add_argument("--calls", type=cli.data_path, metavar="FILE", help="who speaks on which channel, per call")
    parser.add_argument("--personal", type=cli.data_path, metavar="DIR", help="what jobs/personalize.py wrote")
    parser.add_argument("--speakers", type=cli.data_path, metavar="FILE", help="enrolments: speaker_id, speaker")
    parser.add_argument(
        "--roles-unknown", action="store_true", help="score all channels, employees perhaps among them; to evaluate"
    )
    parser.add_argument("--limit", type=cli.count, metavar="N", help="only the first N sessions or recordings")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    cli.add_rerun_options(parser)
    args = parser.parse_args(argv)

    import vaemo

    vaemo.score(
        input=args.input,
        checkpoint=args.checkpoint,
        out=args.out,
        calls=args.calls,
        personal=args.personal,
        speakers=args.speakers,
        roles_unknown=args.roles_unknown,
        config=cli.load_config(args),
        exclude=args.exclude,
        limit=args.limit,
        dry_run=args.dry_run,
        retry_failed=args.retry_failed,
        changed=args.changed,
        voices_from=args.voices_from,
    )


if __name__ == "__main__":
    cli.run(main)
