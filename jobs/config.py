#!/usr/bin/env python3
"""Every setting with what it means, as --config and --set make it: a file to start from."""

from __future__ import annotations

from vaemo import cli


def main(argv: list[str] | None = None) -> None:
    parser = cli.JobParser(__doc__)
    print(cli.load_config(parser.parse_args(argv)).explained(), end="", flush=True)


if __name__ == "__main__":
    cli.run(main)
