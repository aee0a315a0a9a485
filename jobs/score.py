#!/usr/bin/env python3
"""Recordings, a manifest or a feature store to scores: valence and arousal of every utterance and every call."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("score")
