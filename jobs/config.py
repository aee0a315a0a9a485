#!/usr/bin/env python3
"""Every setting with what it means, as --config and --set make it: a file to start from."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("config")
