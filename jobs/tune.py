#!/usr/bin/env python3
"""Search over fields of the config: many short trainings on one feature store, side by side."""

from __future__ import annotations

from vaemo import cli
from vaemo.tuning.search import METHODS, SCHEDULERS


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser(__doc__)
    path, count = cli.data_path, cli.count
    parser.add_argument("--store", type=path, required=True, help="feature store of jobs/extract.py, or your own")
    parser.add_argument("--space", required=True, help="YAML file of fields and values, such as those in tune_spaces")
    parser.add_argument("--out", type=path, required=True, metavar="SWEEP", help="folder; one that is there goes on")
    parser.add_argument("--trials", type=count, help="in all, the config itself too (default: 20, or the whole grid)")
    parser.add_argument("--search", choices=METHODS, help="how points are drawn (default: tpe)")
    parser.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default="auto",
        help="end poor trials early (asha), none, or let them go on from good ones (pbt); auto is asha, but none "
        "where the space searches the sampling schedule",
    )
    parser.add_argument("--workers", type=count, default=1, help="processes that train one trial; divides train.lanes")
    parser.add_argument("--gpus", type=float, help="share of a GPU for each process; a whole one where there is any")
    parser.add_argument("--folds", help="by=fold, by=speaker or k=N: the mean over folds is searched for")
    parser.add_argument("--seeds", type=count, default=1, help="trainings of each trial; their mean counts")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.cluster.tune import tune

    with cli.summary(args.out):
        tune(
            args.store,
            args.space,
            args.out,
            config,
            trials=args.trials,
            search=args.search,
            scheduler=args.scheduler,
            workers=args.workers,
            gpus=args.gpus,
            folds=args.folds,
            seeds=args.seeds,
        )


if __name__ == "__main__":
    cli.run(main)
