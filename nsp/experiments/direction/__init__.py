"""Directions by difference in means: found, chosen, ablated and added."""
