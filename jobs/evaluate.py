#!/usr/bin/env python3
"""Scores against labels."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("evaluate")
