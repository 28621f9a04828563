"""Set networks: inputs without an order."""
