"""Neuromorphic networks: neurons that speak in spikes."""
