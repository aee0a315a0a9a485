#!/usr/bin/env python3
"""All of vaemo on speech that it makes."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser("Make speech, extract, train with and without memory, score, evaluate and report it.")
    parser.add_argument("--out", type=cli.data_path, required=True, metavar="DIR", help="the folder for all of it")
    args = parser.parse_args(argv)
    config = cli.load_config(args)

    from vaemo.demo.run import run_demo

    with cli.summary(args.out):
        run_demo(args.out, config)


if __name__ == "__main__":
    cli.run(main)
