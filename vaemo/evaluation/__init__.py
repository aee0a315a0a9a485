"""Scores against labels: numbers with intervals, and pictures."""
