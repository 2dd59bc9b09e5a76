"""Causal tracing: corrupt a subject with noise, restore single states and windows of layers."""
