#!/usr/bin/env python3
"""All of vaemo on speech that it makes."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("demo")
