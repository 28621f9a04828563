"""The few places that must touch a backend: its choice, gradients, export."""
