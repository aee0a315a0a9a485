#!/usr/bin/env python3
"""Train a session model on a feature store."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("train")
