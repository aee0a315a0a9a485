"""Recordings become samples, and utterances found in them."""

READING = 2
"""What is read from a file: 1 until time stamps, gaps, damage and further tracks counted. It belongs into the fingerprints
of what is made from audio, since other samples may come of the same file under another number."""
