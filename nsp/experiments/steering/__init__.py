"""Steering: a circuit scaled or a vector added while a model writes."""
