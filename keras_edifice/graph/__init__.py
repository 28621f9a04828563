"""Graph networks: node features mixed along edges."""
