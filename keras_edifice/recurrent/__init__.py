"""Recurrent networks: a state that is updated once per token."""
