"""Configs that `--config NAME` finds: the original recipe `seed`, and `default`, chosen by evidence."""
