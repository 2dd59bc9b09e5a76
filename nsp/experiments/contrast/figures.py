"""Figures of a contrast: the units that differ most, and how well each layer's vector separates the sets."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from nsp.report.figures import Figure, Lines, Scatter, View, figure
from nsp.report.series import mean_series, units_by_layer


def figures(tree: xr.DataTree) -> list[Figure]:
    """Units by layer with their effect sizes, and the control vectors' separation by layer."""
    groups = {
        str(name): node.to_dataset() for name, node in tree["attribution"].children.items() if not str(name).endswith("-neurons")
    }
    views = [View(make=partial(_units, dataset), name=name, component=name) for name, dataset in groups.items()]
    found = [figure("units", "units that tell the sets apart", *views)]
    for variable, title, y, meaning in (
        ("separation", "control vectors by layer", "Cohen's d", "how far apart held-out prompts lie along the vector"),
        ("right_side", "held-out prompts on the right side", "share", "share of held-out prompts that the vector puts on their side"),
    ):
        there = {name: dataset[variable] for name, dataset in groups.items() if dataset[variable].dims == ("layer",)}
        finding = None if variable == "separation" else ""
        if there:
            found.append(figure("vectors", title, partial(_by_layer, there, y, meaning, finding)))
    return found


def _by_layer(groups: dict[str, xr.DataArray], y: str, meaning: str, finding: str | None) -> Lines:
    series = tuple(mean_series(name, values, "layer") for name, values in groups.items())
    return Lines(series=series, x="layer", y=y, meaning=meaning, whole=True, finding=finding)


def _units(dataset: xr.Dataset) -> Scatter:
    d = dataset["cohen_d"].load()
    unit = next(str(dim) for dim in d.dims if dim != "layer")
    difference, p = (np.asarray(dataset[name].transpose("layer", unit).values) for name in ("difference", "p_corrected"))

    def told(row: int, place: int) -> str:
        return f"difference {difference[row, place]:.3g}, corrected p {p[row, place]:.3g}"

    meaning = "effect size of positive less negative prompts, the largest"
    return Scatter(series=(units_by_layer(d, unit, told),), x="layer", y="Cohen's d", meaning=meaning, whole=True)
