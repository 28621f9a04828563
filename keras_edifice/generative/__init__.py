"""Generative models: learning the distribution of the data."""
