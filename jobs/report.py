#!/usr/bin/env python3
"""Scores to a page that opens from disk, and pictures."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("report")
