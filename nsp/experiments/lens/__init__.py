"""Lenses: what the residual stream would say at each layer."""
