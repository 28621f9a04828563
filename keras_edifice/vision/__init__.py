"""Vision backbones beyond plain convolutions."""
