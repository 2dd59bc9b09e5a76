"""Patchscopes: a representation read in one prompt and put into another, over grids of layers."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
