#!/usr/bin/env python3
"""Train a session model on a feature store."""

from vaemo.cli import JobParser, data_path, load_config, run


def main(argv: list[str] | None) -> None:
    parser = JobParser(__doc__)
    parser.add_argument("--store", type=data_path, required=True, help="feature store of jobs/extract.py, or your own")
    parser.add_argument("--out", type=data_path, required=True, help="run folder; a run that is there goes on")
    parser.add_argument("--workers", type=int, default=1, help="processes that train together; divides train.lanes")
    parser.add_argument("--folds", help="by=fold, by=speaker or k=N: hold out one at a time")
    args = parser.parse_args(argv)
    from vaemo.cluster.train import train

    train(args.store, args.out, load_config(args), workers=args.workers, folds=args.folds)


if __name__ == "__main__":
    run(main)
