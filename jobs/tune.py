#!/usr/bin/env python3
"""Search over fields of the config: many short trainings on one feature store, side by side."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("tune")
