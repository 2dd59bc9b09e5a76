"""Figures of a capture: units by layer, how much they vary, and the units that stand out with the tokens that they fire on."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from nsp.experiments.capture.summary import top_examples, unit_statistics
from nsp.report.figures import Figure, Lines, Scatter, Series, View, figure
from nsp.report.labels import short
from nsp.report.series import between_layers
from nsp.report.site_panels import site_names

_UNITS = 60  # of a component, drawn with their top examples
_EXAMPLES = 3
_NAMES = {"mean": "mean of a unit", "std": "standard deviation of a unit", "max": "largest value by layer"}


def figures(tree: xr.DataTree) -> list[Figure]:
    """Mean, spread and largest value by layer for all components and for each; then the units that stand out most."""
    names = [str(name) for name in tree["activations"].children]
    found = []
    for variable, title in _NAMES.items():
        views = [View(make=partial(_by_layer, tree, name, variable), name=name, component=name) for name in names]
        views += [View(make=partial(_components, tree, names, variable), name="all components")] if len(names) > 1 else []
        found.append(figure("capture", title, *views))
    units = [View(make=partial(_standing_out, tree, name), name=name, component=name) for name in names]
    return [*found, figure("units", "units that stand out, with their top examples", *units)]


def _by_layer(tree: xr.DataTree, name: str, variable: str) -> Lines:
    """The spread of one statistic over a component's units: median, 5 to 95 % of units, and the largest."""
    statistics = unit_statistics(tree, name)
    values = statistics[variable].transpose("layer", ...)
    flat = np.asarray(values.values, dtype=np.float64).reshape(values.sizes["layer"], -1)
    layers = values["layer"].values.astype(float)
    low, middle, high = np.nanpercentile(flat, [5, 50, 95], axis=1)
    series = [Series(name="median, 5 to 95 % of units", x=layers, y=middle, low=low, high=high)]
    several = variable != "mean"
    series += [Series(name="largest unit", x=layers, y=flat.max(axis=1))] if several else []
    tokens = int(tree["inputs"].to_dataset()["n_tokens"].sum())
    return Lines(
        series=tuple(series),
        remark=f"n = {flat.shape[1]} units a layer, over {tokens} tokens" + ("" if several else "; band: 5 to 95 % of units"),
        x="layer",
        y="activation",
        meaning=_NAMES[variable] if variable != "max" else "largest value of a unit",
        units="activation",
        levels=() if several else (0.0,),
        log_y=several and bool((low > 0).all()),
        whole=True,
        finding="",
    )


def _components(tree: xr.DataTree, names: list[str], variable: str) -> Lines:
    """One statistic of several components: its mean over units, or the largest of any."""
    series = []
    for name in names:
        values = unit_statistics(tree, name)[variable]
        rest = [dim for dim in values.dims if dim != "layer"]
        line = values.max(rest) if variable == "max" else abs(values).mean(rest)
        series.append(Series(name=name, x=line["layer"].values.astype(float), y=np.asarray(line.values, dtype=float)))
    said = "largest value of any unit" if variable == "max" else f"{_NAMES[variable]}, mean over units"
    return Lines(series=tuple(series), x="layer", y="activation", meaning=said, units="activation", whole=True, finding="")


def _standing_out(tree: xr.DataTree, name: str) -> Scatter:
    statistics = unit_statistics(tree, name)
    size = (statistics["max"] - statistics["mean"]) / statistics["std"].where(statistics["std"] > 0)
    score = size.fillna(0.0).transpose("layer", ...)
    flat = score.values.reshape(-1)
    best = np.argsort(-flat, kind="stable")[:_UNITS]
    count = flat.size // score.sizes["layer"]
    notes, places = [], [np.unravel_index(int(at), score.shape) for at in best]
    for label, place in zip(site_names(score, best), places, strict=True):
        at = {str(dim): int(score[dim].values[one]) for dim, one in zip(score.dims, place, strict=True)}
        shown = top_examples(tree, name, at["layer"], at["neuron"], head=at.get("head"), k=_EXAMPLES)
        examples = zip(shown["max"].values, shown["context"].values, strict=True)
        notes.append(f"{label}; top examples: " + "; ".join(f"{float(value):.3g} in {short(str(text), 80)}" for value, text in examples))
    x = between_layers(score["layer"].values[[place[0] for place in places]], best % count, count)
    return Scatter(
        series=(Series(name=name, x=x, y=flat[best], notes=tuple(notes)),),
        x="layer",
        y="standard deviations",
        meaning="largest value, in standard deviations above the unit's mean",
        whole=True,
    )
