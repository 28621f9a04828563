"""Convolutional networks: local filters with shared weights."""
