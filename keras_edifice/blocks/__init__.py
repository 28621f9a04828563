"""Building blocks: layers that several architectures share."""
