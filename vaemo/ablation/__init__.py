"""Ablation: each part of the model is removed or replaced, and the results are compared with the full model."""
