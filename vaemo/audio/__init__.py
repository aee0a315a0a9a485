"""Decoding of recordings, and detection of utterances in them."""

READING = 2
"""How recordings are read: which samples and times follow from a file. It joins the fingerprints of what is made from
audio, so that no folder mixes two ways. 1: gaps, damage and further tracks were skipped; 2: one timeline."""
