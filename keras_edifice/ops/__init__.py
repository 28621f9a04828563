"""Functions on tensors, without weights."""
