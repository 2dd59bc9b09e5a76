"""Mean activations over a set of prompts, for mean ablation."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
