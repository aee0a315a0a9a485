#!/usr/bin/env python3
"""Train a session model on a feature store."""

from vaemo.cli import JobParser, data_path, load_config, run


def main(argv: list[str] | None) -> None:
    parser = JobParser(__doc__)
    parser.add_argument("--store", type=data_path, required=True, help="feature store of jobs/extract.py, or your own")
    parser.add_argument("--out", type=data_path, required=True, help="run folder; a run that is there goes on")
    parser.add_argument("--workers", type=int, default=1, help="processes that train together; divides train.lanes")
    parser.add_argument("--folds", help="by=fold, by=speaker or k=N: hold out one at a time")
    parser.add_argument("--manifest", type=data_path, help="what STORE was extracted from; to train its encoder too")
    parser.add_argument("--speakers", type=data_path, metavar="FILE", help="enrolments: speaker_id, speaker")
    args = parser.parse_args(argv)
    config = load_config(args)
    from vaemo.cluster.train import train

    options = {"workers": args.workers, "folds": args.folds, "manifest": args.manifest, "speakers": args.speakers}
    train(args.store, args.out, config, **options)


if __name__ == "__main__":
    run(main)
