"""An alignment scan: neurons that fire on one set of prompts and not on another."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
