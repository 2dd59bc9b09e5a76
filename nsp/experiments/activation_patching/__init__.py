"""Activation patching: sites, modes, metrics, statistics."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
