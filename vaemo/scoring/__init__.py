"""Sessions replayed through trained models: who may be scored, and what is kept of it."""
