"""From sources to features and scores: sources, plans, stages and executors."""
