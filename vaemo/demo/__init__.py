"""A demonstration on synthetic speech: everything from recordings to a report, in minutes."""
