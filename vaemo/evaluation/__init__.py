"""Evaluation of scores against labels: metrics with intervals, and pictures."""
