"""Probabilistic networks: predictions that carry their uncertainty."""
