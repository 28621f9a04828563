"""Feedforward networks: learners of flat vectors."""
