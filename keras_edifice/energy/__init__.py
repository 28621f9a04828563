"""Energy-based networks: computation as descent on an energy."""
