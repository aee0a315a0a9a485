"""Truncated backpropagation through time over lanes of sessions, without Ray."""
