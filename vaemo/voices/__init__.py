"""Diarisation of channels with several speakers, and the roles of their voices."""
