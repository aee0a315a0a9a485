"""Folders of parts, written exactly once: what each part holds, counted and indexed, by one driver at a time."""
