#!/usr/bin/env python3
"""What each part of the model is worth: without it, or with another in its place."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("ablate")
