#!/usr/bin/env python3
"""A small change of the model for every speaker, learned from the speaker's first labelled utterances."""

from vaemo import commands

if __name__ == "__main__":
    commands.run("personalize")
