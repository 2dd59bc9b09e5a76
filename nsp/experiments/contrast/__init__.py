"""Neurons that tell two sets of prompts apart, control vectors, and what they are made of."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
