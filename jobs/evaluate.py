#!/usr/bin/env python3
"""Scores against labels."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser("CCC, RMSE, Pearson's r and MAE with intervals over sessions, by group, and compared.")
    path = cli.data_path
    parser.add_argument("--scores", type=path, required=True, metavar="SCORES", help="folder that jobs/score.py wrote")
    parser.add_argument("--labels", type=path, required=True, metavar="STORE|MANIFEST", help="where the labels are")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="metrics.json and pictures go here")
    parser.add_argument("--split", help="only this split; 'test' where any row has it, else all rows, with a warning")
    parser.add_argument("--exclude", type=path, metavar="PARQUET", help="leave out the utterances listed there")
    parser.add_argument("--compare", type=path, metavar="SCORES", help="other scores of the same utterances, paired")
    cli.add_checkpoint(parser, "replay it on the store with labels fed, too", required=False)
    parser.add_argument("--card", type=path, metavar="CHECKPOINT", help="put the result into its model card")
    args = parser.parse_args(argv)

    import vaemo
    from vaemo.evaluation.evaluate import table_of

    result = vaemo.evaluate(
        scores=args.scores,
        labels=args.labels,
        out=args.out,
        split=args.split,
        exclude=args.exclude,
        compare=args.compare,
        checkpoint=args.checkpoint,
        card=args.card,
        config=cli.load_config(args),
    )
    print(f"{table_of(result)}\n\nsee {args.out}/metrics.json", flush=True)


if __name__ == "__main__":
    cli.run(main)
