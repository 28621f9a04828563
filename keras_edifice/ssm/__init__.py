"""State-space models: linear dynamical systems and their selective relatives."""
