"""Causal tracing: corrupt a subject with noise, restore single states and windows of layers."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
