#!/usr/bin/env python3
"""A small change of the model for every speaker, learned from the speaker's first labelled utterances."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser(__doc__)
    parser.add_argument("--store", type=cli.data_path, required=True, help="feature store with labels")
    cli.add_checkpoint(parser, "a trained model")
    parser.add_argument(
        "--out", type=cli.data_path, required=True, metavar="DIR", help="what score takes as --personal"
    )
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.personalize import personalize_store

    with cli.summary(args.out):
        speakers = personalize_store(args.store, args.checkpoint, args.out, config)
        kept = sum(speakers["kept"].to_pylist())
        print(f"{kept} of {len(speakers)} speakers changed; see {args.out}/speakers.parquet", flush=True)


if __name__ == "__main__":
    cli.run(main)
