#!/usr/bin/env python3
"""Train a session model on a feature store."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser(__doc__)
    path, count = cli.data_path, cli.count
    parser.add_argument("--store", type=path, required=True, help="feature store of jobs/extract.py, or your own")
    parser.add_argument("--out", type=path, required=True, metavar="RUN", help="run folder; one that is there goes on")
    parser.add_argument("--workers", type=count, default=1, help="processes that train one model; divides train.lanes")
    parser.add_argument("--folds", help="by=fold, by=speaker or k=N: hold out one at a time")
    parser.add_argument("--seeds", type=count, default=1, help="trainings, from train.seed on: an ensemble")
    parser.add_argument("--manifest", type=path, metavar="FILE", help="of which the store is; to train its encoder too")
    parser.add_argument("--speakers", type=path, metavar="FILE", help="enrolments: speaker_id, speaker")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.cluster.executor import OnRay
    from vaemo.pipeline.training import train

    with cli.summary(args.out):
        train(
            args.store,
            args.out,
            config,
            OnRay(),
            workers=args.workers,
            folds=args.folds,
            seeds=args.seeds,
            manifest=args.manifest,
            speakers=args.speakers,
        )


if __name__ == "__main__":
    cli.run(main)
