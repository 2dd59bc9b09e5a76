"""Figures of values at sites: heatmaps, the strongest site of each layer, estimates against exact effects.

Each function takes a dataset such as a store's ``effects/<component>`` and gives a panel. Colours diverge from the
value of "nothing changed": 0 for effects, the base run's value for a raw metric.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr

from nsp.errors import InputError, suggestion
from nsp.report.figures.prepared import Bars, Grid, Scatter, diverging, meaning, token_label, visible
from nsp.statistics import mean_effects

AXES = ("layer", "position", "head", "neuron")
_MAIN = ("effect", "change", "indirect_effect", "contribution")
_MOST_NUMBERS = 200_000  # of which bootstrap intervals take no time worth waiting for

Which = int | Literal["mean"]


def heatmap(
    dataset: xr.Dataset,
    metric: str = "effect",
    pair: Which = 0,
    *,
    base: float | None = None,
    units: Mapping[str, int] | None = None,
    intervals: bool = True,
) -> Grid:
    """One variable of a sweep, for one pair or as the mean over pairs.

    Args:
        dataset: a component's effects, with some of the dims (pair | prompt, layer, position, head | neuron); a
            coordinate ``token_text`` on (pair, position) or (position) labels the positions.
        metric: the variable.
        pair: which pair (or prompt, where a run has those), counted from 0; or ``mean``, with 95 % intervals.
        base: the value that means "nothing changed"; by default 0 for an effect, and ``<metric>_base`` for a raw metric
            where the dataset has it (else 0).
        units: fixes heads or neurons: ``{"head": 3}``. A dim that is neither fixed nor drawn shows, in each cell, the
            value farthest from `base`.
        intervals: whether a mean gets its bootstrap intervals.

    Raises:
        InputError: there is no such variable, pair or unit; or a mean over prompts whose tokens differ.
    """
    values = _drawable(dataset, metric)
    outer = outer_dim(dataset)
    count = dataset.sizes.get(outer, 1) if outer in values.dims else 1
    values, fixed = _fix(values, units or {})
    values, chosen = _one(values, dataset, outer, pair)
    centre = base if base is not None else _base(chosen, metric)
    x, y, rest = _drawn(values)
    values, folded = _strongest(values, chosen, rest, centre, outer)
    low = high = None
    said = f"{outer} {pair} of {count}" if count > 1 else ""
    if outer in values.dims:
        values, low, high, said = _mean(values, dataset, outer, x, intervals)
    order = (y, x) if y else (x,)
    grid = _grid(values.transpose(*order))
    labels = _columns(chosen, values, x)
    shown = [place for place, label in enumerate(labels) if label or np.isfinite(grid[:, place]).any()]
    shown = shown or list(range(len(labels)))  # not the padding that other, longer pairs left behind
    ends = [None if end is None else _grid(end.transpose(*order))[:, shown] for end in (low, high)]
    return Grid(
        remark=", ".join(part for part in (said, *fixed, *folded) if part),
        values=grid[:, shown],
        rows=tuple(str(row) for row in values[y].values) if y else ("",),
        columns=tuple(labels[place] for place in shown),
        y=str(y) if y else "",
        x=str(x),
        meaning=meaning(dataset[metric], metric),
        scale=diverging(grid, centre),
        low=ends[0],
        high=ends[1],
    )


def base_value(tree: xr.DataTree, metric: str, pair: Which) -> float | None:
    """The base run's value of a metric, where a raw metric's colours diverge; None where the store does not say.

    ``inputs/base`` (pair) tells which prompt is the base run, ``baseline/<metric>_<prompt>`` (pair) what it gave; of
    the mean over pairs it is the mean.
    """
    if not {"inputs", "baseline"} <= set(tree.children):
        return None
    inputs, baseline = tree["inputs"].to_dataset(), tree["baseline"].to_dataset()
    if "base" not in inputs or (pair != "mean" and not 0 <= pair < inputs["base"].size):
        return None
    rows = range(inputs["base"].size) if pair == "mean" else [pair]
    names = [f"{metric}_{inputs['base'].values[row]}" for row in rows]
    found = [float(baseline[name].values[row]) for row, name in zip(rows, names, strict=True) if name in baseline]
    value = float(np.mean(found)) if len(found) == len(names) and found else math.nan
    return value if math.isfinite(value) else None


def main_variable(dataset: xr.Dataset) -> str:
    """The variable that says what a component does: its effect, else the first number that has sites."""
    fits = [str(name) for name, array in dataset.data_vars.items() if array.dtype.kind == "f" and array.ndim]
    if not fits:
        raise InputError("there are no numbers to draw here")
    return next((name for name in _MAIN if name in fits), fits[0])


def layer_bars(dataset: xr.Dataset, metric: str | None = None) -> Bars:
    """The strongest site of each layer: its mean over pairs, with a 95 % bootstrap interval where there are several.

    Args:
        dataset: a component's effects, with the dim layer and some of (pair | prompt, position, head | neuron).

    Raises:
        InputError: there are no layers, or several prompts whose positions have nothing in common.
    """
    metric = metric or main_variable(dataset)
    values = _number(dataset, metric)
    if "layer" not in values.dims:
        has = ", ".join(map(str, values.dims)) or "no dims"
        raise InputError(f"{metric} has no layers to draw bars of; it has {has}")
    outer = next((dim for dim in ("pair", "prompt") if dim in values.dims), None)
    if outer == "prompt" and values.sizes["prompt"] > 1 and values.sizes.get("position", 1) > 1:
        raise InputError("a mean over prompts by position has no meaning: their tokens differ; draw a heatmap")
    count = values.sizes[outer] if outer else 1
    sites = values.rename({outer: "pair"}) if outer == "prompt" else values
    found = mean_effects(sites if outer else sites.expand_dims("pair"))
    rest = [dim for dim in found["mean"].dims if dim != "layer"]
    if rest:
        flat = found.stack(_site=rest, create_index=False)
        best = abs(flat["mean"]).fillna(-1.0).argmax("_site")
        found = flat.isel(_site=best)
    layers = found["layer"].values
    notes = [", ".join(f"{dim} {found[dim].values[row]}" for dim in rest) for row in range(len(layers))]
    mean, low, high = (np.asarray(found[name].values, dtype=np.float64) for name in ("mean", "low", "high"))
    kind = "the strongest site of each layer" if any(values.sizes[dim] > 1 for dim in rest) else "each layer"
    said = f"mean of {count} {outer}s, 95 % interval" if count > 1 else f"one {outer or 'value'}, no interval"
    return Bars(
        remark=f"{kind}, {said}",
        labels=tuple(str(layer) for layer in layers),
        values=mean,
        low=low,
        high=high,
        notes=tuple(note if np.isfinite(value) else "" for note, value in zip(notes, mean, strict=True)),
        x="layer",
        meaning=meaning(values, metric),
    )


def effect_scatter(effects: xr.Dataset, scores: xr.Dataset, method: str | None = None) -> Scatter:
    """Exact effects against a method's estimates, a point a site and prompt.

    Args:
        effects, scores: one component's groups ``effects`` and ``attribution``, of the same dims.
        method: a variable of `scores`; by default the first that has the effects' dims.
    """
    exact = _number(effects, main_variable(effects))
    fits = [str(name) for name, array in scores.data_vars.items() if set(array.dims) == set(exact.dims)]
    method = method or next(iter(fits), "")
    if method not in fits:
        raise InputError(f"there is no estimate {method!r}{suggestion(method, fits)} ({', '.join(fits) or 'none'})")
    estimate, truth = xr.align(scores[method].transpose(*exact.dims), exact, join="exact")
    x, y = (np.asarray(part.values, dtype=np.float64).ravel() for part in (estimate, truth))
    there = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if not there.size:
        raise InputError(f"no site has both an exact effect and an estimate by {method}")
    places = np.unravel_index(there, truth.shape)
    labels = [truth[dim].values if dim in truth.coords else np.arange(truth.sizes[dim]) for dim in truth.dims]
    found = {str(dim): label[at] for dim, label, at in zip(truth.dims, labels, places, strict=True)}
    left = x.size - there.size
    return Scatter(
        remark=f"n = {there.size} sites" + (f", {left} without a value left out" if left else ""),
        x=x[there],
        y=y[there],
        places=found,
        x_meaning=f"{method}: {meaning(scores[method], method)}",
        y_meaning=f"exact: {meaning(exact, str(exact.name))}",
    )


def _drawable(dataset: xr.Dataset, metric: str) -> xr.DataArray:
    drawable = [str(name) for name, variable in dataset.data_vars.items() if set(variable.dims) & set(AXES)]
    if not drawable:
        raise InputError(
            f"a heatmap needs one of {', '.join(AXES)}; these results lie along {', '.join(map(str, dataset.sizes))}: "
            "see nsp show and nsp report"
        )
    if metric not in drawable:
        raise InputError(f"there is no metric {metric!r} to draw{suggestion(metric, drawable)} ({', '.join(drawable)})")
    return dataset[metric]


def _number(dataset: xr.Dataset, metric: str) -> xr.DataArray:
    known = [str(name) for name, array in dataset.data_vars.items() if array.dtype.kind == "f"]
    if metric not in known:
        raise InputError(f"there is no metric {metric!r} to draw{suggestion(metric, known)} ({', '.join(known)})")
    return dataset[metric].load()


def outer_dim(dataset: xr.Dataset) -> str:
    """The dim of which one is drawn: pairs, or prompts where a run has those."""
    return "prompt" if "prompt" in dataset.dims and "pair" not in dataset.dims else "pair"


def _one(values: xr.DataArray, dataset: xr.Dataset, outer: str, pair: Which) -> tuple[xr.DataArray, xr.Dataset]:
    """One pair of values and dataset; for a mean the values of all, and the dataset as it is."""
    count = dataset.sizes.get(outer, 1)
    if pair == "mean" and count > 1 and outer in values.dims:
        return values, dataset
    place = 0 if pair == "mean" else pair
    if not 0 <= place < count:
        has = f"{outer} 0 only" if count == 1 else f"0 to {count - 1}"
        raise InputError(f"there is no {outer} {place}; the store has {has}")
    chosen = dataset.isel({outer: place}) if outer in dataset.dims else dataset
    return (values.isel({outer: place}) if outer in values.dims else values), chosen


def _fix(values: xr.DataArray, units: Mapping[str, int]) -> tuple[xr.DataArray, list[str]]:
    for dim, index in units.items():
        if dim not in values.dims:
            raise InputError(f"{values.name} has no dim {dim!r}; it has {', '.join(map(str, values.dims))}")
        known = values[dim].values
        if index not in known:
            raise InputError(f"there is no {dim} {index}; the store has {known.min()} to {known.max()}")
        values = values.sel({dim: index})
    return values, [f"{dim} {index}" for dim, index in units.items()]


def _drawn(values: xr.DataArray) -> tuple[Hashable, Hashable | None, list[Hashable]]:
    """The dims along x and y, and those that remain: x is positions if there are several, else units."""
    wide = [dim for dim in ("position", "head", "neuron") if values.sizes.get(dim, 0) > 1]
    there: list[Hashable] = [dim for dim in ("position", "head", "neuron", "layer") if dim in values.dims]
    x_dim: Hashable = wide[0] if wide else there[0]
    y_dim = "layer" if "layer" in values.dims and x_dim != "layer" else None
    return x_dim, y_dim, [dim for dim in values.dims if dim not in (x_dim, y_dim)]


def _strongest(
    values: xr.DataArray, dataset: xr.Dataset, rest: list[Hashable], centre: float, outer: str
) -> tuple[xr.DataArray, list[str]]:
    """The strongest along dims that are not drawn; where pairs are among them, of the mean over pairs."""
    rest = [dim for dim in rest if dim != outer]
    if not rest:
        return values, []
    sizes = [(str(dim), values.sizes[dim]) for dim in rest]
    flat = values.stack(_rest=rest, create_index=False)
    judged = flat.mean(outer) if outer in flat.dims else flat
    distance = abs(judged - centre).fillna(-1.0)
    names = [f"the strongest {dim} of {size} in each cell" for dim, size in sizes if size > 1]
    names += [f"{dim} {_columns(dataset, values, dim)[0]}" for dim, size in sizes if size == 1 and dim in values.coords]
    return flat.isel(_rest=distance.argmax("_rest")), names


def _mean(
    values: xr.DataArray, dataset: xr.Dataset, outer: str, x: Hashable, intervals: bool
) -> tuple[xr.DataArray, xr.DataArray | None, xr.DataArray | None, str]:
    """The mean over pairs, its interval where that is quickly made, and what to say of it."""
    texts = dataset.coords.get("token_text")
    if x == "position" and outer == "prompt" and (texts is None or (outer in texts.dims and not _alike(texts, outer))):
        raise InputError("a mean over prompts by position has no meaning: their tokens differ; draw one with --pair")
    count = values.sizes[outer]
    kept = values.reset_coords(drop=True)
    if intervals and values.size <= _MOST_NUMBERS:
        found = mean_effects(kept.rename({outer: "pair"}) if outer != "pair" else kept, resamples=1000)
        return found["mean"], found["low"], found["high"], f"mean of {count} {outer}s"
    return kept.mean(outer, dtype=np.float64), None, None, f"mean of {count} {outer}s"


def _alike(texts: xr.DataArray, outer: str) -> bool:
    rows = texts.transpose(outer, ...).values
    return bool((rows == rows[:1]).all())


def _base(dataset: xr.Dataset, metric: str) -> float:
    if metric.split("_")[0] != "effect" and f"{metric}_base" in dataset:
        base = dataset[f"{metric}_base"]
        if base.ndim == 0 and np.isfinite(base):
            return float(base)
    return 0.0


def _columns(dataset: xr.Dataset, values: xr.DataArray, dim: Hashable) -> list[str]:
    """The labels along a dim: positions by their tokens and places, as far as all pairs drawn have them in common."""
    index = [str(item) for item in (values[dim].values if dim in values.coords else range(values.sizes[dim]))]
    if dim != "position":
        return index
    tokens, places = (_common(dataset.coords.get(name), dim) for name in ("token_text", "token_position"))
    labels = []
    for at, label in enumerate(index):
        text = None if tokens is None else tokens[at]
        place = label if places is None else places[at]
        if text is None:
            labels.append(label)
        else:
            labels.append(visible(str(text)) if place is None else token_label(str(text), place))
    return labels


def _common(labels: xr.DataArray | None, dim: Hashable) -> list[Any] | None:
    """The labels along a dim, None where pairs differ; None as a whole where there are no labels of this dim."""
    if labels is None or dim not in labels.dims or labels.ndim > 2:
        return None
    rows = np.atleast_2d(labels.transpose(..., dim).values)
    return [column[0] if (column == column[0]).all() else None for column in rows.T]


def _grid(values: xr.DataArray) -> np.ndarray:
    return np.atleast_2d(np.asarray(values.values, dtype=np.float64))
