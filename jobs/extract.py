#!/usr/bin/env python3
"""Recordings to a feature store."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("extract")
