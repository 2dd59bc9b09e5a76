"""Figures of activation patching: every site, and the strongest site of each layer."""

from __future__ import annotations

from functools import partial

import xarray as xr

from nsp.report.default_figures import figures_by_dims
from nsp.report.figures import Figure, Lines, Series, View, figure
from nsp.report.site_panels import strongest_by_layer


def figures(tree: xr.DataTree) -> list[Figure]:
    """Heatmaps (or lines, where sites are layers), and over several pairs the strongest site of each layer."""
    effects = {str(name): node.to_dataset(inherit=True) for name, node in tree["effects"].children.items()}
    several = {
        name: dataset
        for name, dataset in effects.items()
        if dataset["effect"].sizes.get("layer", 1) > 1
        and dataset["effect"].sizes["pair"] > 1
        and any(size > 1 for dim, size in dataset["effect"].sizes.items() if dim not in ("pair", "layer"))
    }
    found = figures_by_dims(tree)
    if several:
        over = f"mean over {next(iter(several.values())).sizes['pair']} pairs"
        found.append(figure("strongest", "strongest site of each layer", View(make=partial(_strongest, several), name=over)))
    return found


def _strongest(effects: dict[str, xr.Dataset]) -> Lines:
    series = []
    for name, dataset in effects.items():
        (bars,) = strongest_by_layer(dataset[["effect"]]).series
        layers = dataset["layer"].values.astype(float)
        series.append(Series(name=name, x=layers, y=bars.y, low=bars.low, high=bars.high, notes=bars.notes))
    remark = "chosen as the strongest of their layers, so their means are somewhat too large"
    return Lines(
        series=tuple(series), x="layer", y="effect", meaning="mean normalised effect", whole=True, finding="", remark=remark
    )


