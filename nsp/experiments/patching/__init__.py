"""Activation patching: sites, modes, metrics, statistics."""
