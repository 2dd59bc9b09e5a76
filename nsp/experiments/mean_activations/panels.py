"""What the report of mean activations draws: how large means and spreads are, by layer."""

from __future__ import annotations

import xarray as xr

from nsp.report.panels import Drawing, View, averaged, chart


def panels(tree: xr.DataTree) -> list[Drawing]:
    """The size of the means and of the standard deviations, averaged over units (and positions), by layer."""
    groups = {str(name): node.to_dataset().load() for name, node in tree["activations"].children.items()}
    drawn: list[Drawing] = []
    for title, variable, meaning in (
        ("size of the means", "mean", "absolute value of a unit's mean, averaged over units"),
        ("spread", "std", "standard deviation of a unit, averaged over units"),
    ):
        series = []
        for name, dataset in groups.items():
            values = abs(dataset[variable])
            series.append(averaged(name, values.mean([dim for dim in values.dims if dim != "layer"]), "layer"))
        drawn.append(chart(title, meaning, "activation", "activation", "layer", [View("", series)]))
    return drawn
