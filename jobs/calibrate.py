#!/usr/bin/env python3
"""Intervals, and corrections where they help, from labelled calls of your own."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("calibrate")
