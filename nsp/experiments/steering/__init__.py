"""Steering: a circuit scaled or a vector added while a model writes."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
