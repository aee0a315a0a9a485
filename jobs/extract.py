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
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed in an earlier run")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.cluster import extract

    extract.run(
        config,
        args.out,
        manifest=args.manifest,
        folder=args.input,
        limit=args.limit,
        dry_run=args.dry_run,
        retry=args.retry_failed,
    )


if __name__ == "__main__":
    cli.run(main)
