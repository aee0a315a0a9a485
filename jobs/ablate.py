#!/usr/bin/env python3
"""What each part of the model is worth: without it, or with another in its place."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser(__doc__)
    parser.add_argument("--store", type=cli.data_path, required=True, help="feature store with labels")
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="DIR", help="the tables; goes on if there")
    parser.add_argument("--seeds", type=cli.count, default=3, metavar="N", help="trainings of every variant")
    parser.add_argument("--folds", help="by=fold, by=speaker or k=N: hold out one at a time, compare on all")
    parser.add_argument("--only", metavar="NAME[,NAME...]", help="compare these alone, such as no-state,no-prosody")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.cluster.executor import OnRay
    from vaemo.pipeline.ablation import ablate

    only = args.only.split(",") if args.only else None
    with cli.summary(args.out):
        ablate(args.store, args.out, config, OnRay(), seeds=args.seeds, folds=args.folds, only=only)


if __name__ == "__main__":
    cli.run(main)
