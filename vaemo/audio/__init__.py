"""Recordings become samples, and utterances found in them."""
