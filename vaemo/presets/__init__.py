"""Configs that `--config NAME` finds: `seed`, the original recipe, and `default`, what the evidence made of it."""
