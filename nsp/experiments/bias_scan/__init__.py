"""A paired bias scan of an aligned and a base model: divergence by layer, star layers, neurons, pair gaps."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
