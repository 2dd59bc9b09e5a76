"""Figures of mean activations: how large means and spreads are, by layer."""

from __future__ import annotations

from functools import partial

import xarray as xr

from nsp.report.figures import Figure, Lines, figure
from nsp.report.series import mean_series


def figures(tree: xr.DataTree) -> list[Figure]:
    """The size of the means and of the standard deviations, averaged over units (and positions), by layer."""
    means, spreads = "absolute value of a unit's mean", "standard deviation of a unit"
    return [
        figure("means", "size of the means", partial(_by_layer, tree, "mean", f"{means}, averaged over units")),
        figure("spread", "spread", partial(_by_layer, tree, "std", f"{spreads}, averaged over units")),
    ]


def _by_layer(tree: xr.DataTree, variable: str, meaning: str) -> Lines:
    groups = {str(name): abs(node.to_dataset()[variable].load()) for name, node in tree["activations"].children.items()}
    series = [
        mean_series(name, values.mean([dim for dim in values.dims if dim != "layer"]), "layer") for name, values in groups.items()
    ]
    return Lines(series=tuple(series), x="layer", y="activation", meaning=meaning, units="activation", whole=True)
