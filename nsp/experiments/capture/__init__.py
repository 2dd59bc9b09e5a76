"""Activations of chosen components over a file of prompts, streamed into a store."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
