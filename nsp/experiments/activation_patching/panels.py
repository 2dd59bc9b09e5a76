"""What the report of an activation-patching run draws: every site, and the strongest site of each layer."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.report.panels import Drawing, Series, View, chart, numbers, panels_of
from nsp.statistics import mean_effects


def panels(tree: xr.DataTree) -> list[Drawing]:
    """Heatmaps (or lines, where sites are layers), and over several pairs the strongest site of each layer."""
    drawn = panels_of(tree)
    series = []
    for name, node in tree["effects"].children.items():
        effect = node.to_dataset(inherit=True)["effect"]
        wide = [dim for dim in effect.dims if dim not in ("pair", "layer") and effect.sizes[dim] > 1]
        if wide and effect.sizes.get("layer", 1) > 1 and effect.sizes["pair"] > 1:
            series.append(_strongest_by_layer(name, effect))
    if series:
        view = View(f"mean over {tree['inputs'].sizes['pair']} pairs", series)
        note = "chosen as the strongest of their layers, so their means are somewhat too large"
        drawn.append(
            chart(
                "strongest site of each layer",
                "mean normalised effect",
                "1",
                "effect",
                "layer",
                [view],
                note=note,
                finding="",
            )
        )
    return drawn


def _strongest_by_layer(name: str, effect: xr.DataArray) -> Series:
    found = mean_effects(effect.load(), resamples=500)
    mean = found["mean"].transpose("layer", ...)
    flat = mean.values.reshape(mean.sizes["layer"], -1)
    best = np.nan_to_num(np.abs(flat), nan=-1.0).argmax(axis=1)
    rows = np.arange(len(best))
    ends = [found[end].transpose("layer", ...).values.reshape(flat.shape)[rows, best] for end in ("low", "high")]
    labels = []
    for row, place in enumerate(best):
        at = np.unravel_index(int(place), mean.shape[1:])
        site = [
            f"{dim} {mean[dim].values[one]}" for dim, one in zip(mean.dims[1:], at, strict=True) if mean.sizes[dim] > 1
        ]
        labels.append(", ".join([f"layer {mean['layer'].values[row]}", *site]))
    return Series(
        name, [float(layer) for layer in mean["layer"].values], numbers(flat[rows, best]), numbers(ends[0]), numbers(ends[1]),
        labels,
    )  # fmt: skip
