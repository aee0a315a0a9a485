#!/usr/bin/env python3
"""Recordings to a feature store."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser("Turn the utterances of a manifest, or of recordings, into a store of features.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", type=cli.data_path, metavar="FILE", help="JSON Lines or Parquet")
    source.add_argument("--input", type=cli.data_path, metavar="FOLDER", help="recordings; utterances are found")
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="STORE", help="the store's folder")
    parser.add_argument("--limit", type=cli.count, metavar="N", help="only the first N utterances or recordings")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and how long it would take")
    cli.add_rerun_options(parser)
    args = parser.parse_args(argv)

    import vaemo

    vaemo.extract(
        out=args.out,
        manifest=args.manifest,
        input=args.input,
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
