"""Panels of values at sites: heatmaps, the strongest site of each layer, estimates against exact effects.

Each function takes a dataset such as a store's ``effects/<component>`` and gives a panel. Colours diverge from the
value of "nothing changed": 0 for effects, the base run's value for a raw metric.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.errors import InputError, suggestion
from nsp.report.figures import Bars, Grid, Panel, Scale, Scatter, Series, Which, diverging
from nsp.report.labels import axis_name, index, meaning_and_units, quoted_value, short, token_label, visible
from nsp.statistics import mean_effects

_Y = ("layer", "sender")
_X = ("position", "target_layer", "head", "receiver", "neuron", "component", "direction")
_MAIN = ("effect", "success", "change", "indirect_effect", "contribution", "perplexity")
_MOST_NUMBERS = 200_000  # of which bootstrap intervals take no time worth waiting for
_TEXTS, _LONGEST = 3, 70  # texts of a cell that are told of a mean
RESAMPLES = 1000


def heatmap(
    dataset: xr.Dataset,
    metric: str | None = None,
    pair: Which = 0,
    *,
    base: float | None = None,
    units: Mapping[str, int] | None = None,
    details: Mapping[str, xr.DataArray] | None = None,
    names: Sequence[str] = (),
) -> Grid:
    """One variable of a sweep, for one pair or as the mean over pairs.

    Args:
        dataset: a component's effects, with some of the dims (pair | prompt, layer, position, head | neuron); a
            coordinate ``token_text`` on (pair, position) or (position) labels the positions.
        metric: the variable; by default the effect.
        pair: which pair (or prompt, where a run has those), counted from 0; or ``mean``, with 95 % intervals.
        base: the value that means "nothing changed"; by default 0 for an effect, and ``<metric>_base`` for a raw metric
            where the dataset has it (else 0).
        units: fixes heads or neurons: ``{"head": 3}``. A dim that is neither fixed nor drawn shows, in each cell, the
            value farthest from `base`; of a mean over pairs, the mean farthest from it.
        details: what else is told of each cell, by a name; of a mean the mean of numbers and some of the texts.
        names: what the pairs are called, for these texts.

    Raises:
        InputError: there is no such variable, pair or unit; or a mean over prompts whose tokens differ.
    """
    metric = metric or main_variable(dataset)
    values = _drawable(dataset, metric)
    outer = outer_dim(dataset)
    count = dataset.sizes.get(outer, 1) if outer in values.dims else 1
    values, fixed = _fix(values.load(), units or {})
    values, chosen = _one(values, dataset, outer, pair)
    centre = base if base is not None else _base(chosen, metric)
    x, y, rest = _axes(values, outer)
    values, folded, places = _strongest(values, chosen, rest, centre, outer)
    low = high = None
    remark = f"{outer} {pair} of {count}" if count > 1 else ""
    if outer in values.dims:
        values, low, high, remark = _mean(values, dataset, outer, x)
    order = (y, x) if y else (x,)
    told = places or _details(details or {}, values, outer, pair, count, names)
    grid = _grid(values.transpose(*order))
    labels = _columns(chosen, values, x)
    # Not the padding that other, longer pairs left behind.
    shown = [place for place, label in enumerate(labels) if label or np.isfinite(grid[:, place]).any()] or [*range(len(labels))]
    ends = [None if end is None else _grid(end.transpose(*order))[:, shown] for end in (low, high)]
    return Grid(
        remark=", ".join(part for part in (remark, *fixed, *folded) if part),
        values=grid[:, shown],
        rows=tuple(str(row) for row in index(values, str(y))) if y else ("",),
        columns=tuple(labels[place] for place in shown),
        y=str(y) if y else "",
        x=axis_name(values, str(x)),
        scale=diverging(grid, centre),
        low=ends[0],
        high=ends[1],
        details={name: np.atleast_2d(part.transpose(*order).values)[:, shown] for name, part in told.items()},
        **meaning_and_units(dataset[metric]),
    )


def labelled_grid(values: xr.DataArray, *, y: str = "", x: str = "", scale: Scale | None = None, **said: Any) -> Grid:
    """A heatmap of an array with two dims, those of its rows and of its columns; ``said`` are further fields of the grid."""
    rows, columns = (str(dim) for dim in values.dims)
    numbers = np.asarray(values.values, dtype=np.float64)
    return Grid(
        values=numbers,
        rows=tuple(map(str, index(values, rows))),
        columns=tuple(map(str, index(values, columns))),
        y=y or axis_name(values, rows),
        x=x or axis_name(values, columns),
        scale=scale or diverging(numbers),
        **said,
    )


def main_variable(dataset: xr.Dataset) -> str:
    """The variable that says what a component does: its effect, else the first number that has sites."""
    fits = [str(name) for name, array in dataset.data_vars.items() if array.dtype.kind == "f" and array.ndim]
    if not fits:
        raise InputError("there are no numbers to draw here")
    return next((name for name in _MAIN if name in fits), fits[0])


def drawable(dataset: xr.Dataset) -> list[str]:
    """The variables that a heatmap can be drawn of, the main one first."""
    found = [
        str(name) for name, array in dataset.data_vars.items() if array.dtype.kind in "fiu" and set(array.dims) & {*_Y, *_X}
    ]
    return sorted(found, key=lambda name: _MAIN.index(name) if name in _MAIN else len(_MAIN))


def wide_axes(values: xr.DataArray) -> tuple[str | None, str | None]:
    """The dims that lie along y and x because they have more than one place; y is None where one alone is wide."""
    y = next((dim for dim in _Y if values.sizes.get(dim, 0) > 1), None)
    x = next((dim for dim in _X if values.sizes.get(dim, 0) > 1), None)
    return (y, x) if x is not None else (None, y)


def outer_dim(dataset: xr.Dataset | xr.DataArray) -> str:
    """The dim of which one is drawn: pairs, or prompts where a run has those."""
    return "prompt" if "prompt" in dataset.dims and "pair" not in dataset.dims else "pair"


def means_by_position(dataset: xr.Dataset) -> bool:
    """Whether positions of one pair or prompt are those of another, so that a mean over them means something.

    Pairs are made from one template; of prompts all must have the same tokens.
    """
    texts = dataset.coords.get("token_text")
    if outer_dim(dataset) == "pair" or dataset.sizes.get("prompt", 1) == 1:
        return True
    if texts is None or "prompt" not in texts.dims:
        return texts is not None
    rows = texts.transpose("prompt", ...).values
    return bool((rows == rows[:1]).all())


def strongest_by_layer(dataset: xr.Dataset, metric: str | None = None) -> Bars:
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
    means = mean_effects(sites if outer else sites.expand_dims("pair"))
    rest = [dim for dim in means["mean"].dims if dim != "layer"]
    if rest:
        flat = means.stack(_site=rest, create_index=False)
        means = flat.isel(_site=abs(flat["mean"]).fillna(-1.0).argmax("_site"))
    layers = means["layer"].values
    wide = [dim for dim in rest if values.sizes[dim] > 1]
    sites_of = [", ".join([f"layer {layer}", *(f"{dim} {means[dim].values[row]}" for dim in wide)]) for row, layer in enumerate(layers)]
    mean, low, high = (np.asarray(means[name].values, dtype=np.float64) for name in ("mean", "low", "high"))
    kind = "the strongest site of each layer" if wide else "each layer"
    said = f"mean of {count} {outer}s, 95 % interval" if count > 1 else f"one {outer or 'value'}, no interval"
    series = Series(x=np.arange(len(layers), dtype=float), y=mean, low=low, high=high, notes=tuple(sites_of))
    return Bars(
        remark=f"{kind}, {said}",
        series=(series,),
        ticks=tuple(map(str, layers)),
        x="layer",
        y=metric,
        finding="",
        **meaning_and_units(values),
    )


def effect_scatter(effects: xr.Dataset, scores: xr.Dataset, method: str | None = None) -> Scatter:
    """Exact effects against a method's estimates, a point for each site and prompt.

    Args:
        effects, scores: one component's groups ``effects`` and ``attribution``, of the same dims.
        method: a variable of `scores`; by default the first that has the effects' dims.
    """
    exact = _number(effects, main_variable(effects))
    fits = [str(name) for name, array in scores.data_vars.items() if set(array.dims) == set(exact.dims)]
    method = method or next(iter(fits), "")
    if method not in fits:
        raise InputError(f"there is no estimate {method!r}{suggestion(method, fits)} ({', '.join(fits) or 'none'})")
    estimate, truth = xr.align(scores[method].load().transpose(*exact.dims), exact, join="exact")
    x, y = (np.asarray(part.values, dtype=np.float64).ravel() for part in (estimate, truth))
    there = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if not there.size:
        raise InputError(f"no site has both an exact effect and an estimate by {method}")
    left = x.size - there.size
    said = meaning_and_units(exact)
    return Scatter(
        remark=f"n = {there.size} sites" + (f", {left} without a value left out" if left else ""),
        series=(Series(name="unit", x=x[there], y=y[there], notes=site_names(truth, there)),),
        x="estimate",
        y="exact change",
        x_meaning=f"{method}: {Panel(**meaning_and_units(scores[method])).quantity}",
        meaning=f"exact: {said['meaning']}",
        units=said["units"],
        equality=True,
        x_told=True,
    )


def site_names(values: xr.DataArray, flat: np.ndarray) -> tuple[str, ...]:
    """What the cells of an array are called, by their places in the flattened array: ``layer 3, head 5``."""
    wide = [dim for dim in values.dims if values.sizes[dim] > 1] or list(values.dims)
    places = dict(zip(values.dims, np.unravel_index(flat, values.shape), strict=True))
    parts = [[f"{dim} {label}" for label in index(values, str(dim))[places[dim]]] for dim in wide]
    return tuple(", ".join(part) for part in zip(*parts, strict=True))


def _drawable(dataset: xr.Dataset, metric: str) -> xr.DataArray:
    known = drawable(dataset)
    if not known:
        raise InputError(
            f"a heatmap needs one of {', '.join((*_Y, *_X))}; these results lie along {', '.join(map(str, dataset.sizes))}: "
            "see nsp show and nsp report"
        )
    if metric not in known:
        raise InputError(f"there is no metric {metric!r} to draw{suggestion(metric, known)} ({', '.join(known)})")
    return dataset[metric]


def _number(dataset: xr.Dataset, metric: str) -> xr.DataArray:
    known = [str(name) for name, array in dataset.data_vars.items() if array.dtype.kind == "f"]
    if metric not in known:
        raise InputError(f"there is no metric {metric!r} to draw{suggestion(metric, known)} ({', '.join(known)})")
    return dataset[metric].load()


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
    for dim, at in units.items():
        if dim not in values.dims:
            raise InputError(f"{values.name} has no dim {dim!r}; it has {', '.join(map(str, values.dims))}")
        known = values[dim].values
        if at not in known:
            raise InputError(f"there is no {dim} {at}; the store has {known.min()} to {known.max()}")
        values = values.sel({dim: at})
    return values, [f"{dim} {at}" for dim, at in units.items()]


def _axes(values: xr.DataArray, outer: str) -> tuple[Hashable, Hashable | None, list[Hashable]]:
    """The dims along x and y, and those that remain; a dim of one place is drawn only where there is no wide one."""
    wide = wide_axes(values)[1]
    there: list[Hashable] = [dim for dim in (*_X, *_Y) if dim in values.dims]
    x: Hashable = wide if wide is not None else there[0]
    y = next((dim for dim in _Y if dim in values.dims and dim != x), None)
    return x, y, [dim for dim in values.dims if dim not in (x, y, outer)]


def _strongest(
    values: xr.DataArray, dataset: xr.Dataset, rest: list[Hashable], centre: float, outer: str
) -> tuple[xr.DataArray, list[str], dict[str, xr.DataArray]]:
    """The strongest along dims that are not drawn, what to say of it, and where along each wide dim it lies."""
    if not rest:
        return values, [], {}
    sizes = [(str(dim), values.sizes[dim]) for dim in rest]
    flat = values.stack(_rest=rest, create_index=False)
    judged = flat.mean(outer) if outer in flat.dims else flat
    places = abs(judged - centre).fillna(-1.0).argmax("_rest")
    said = [f"the strongest {dim} of {size} in each cell" for dim, size in sizes if size > 1]
    said += [f"{dim} {_columns(dataset, values, dim)[0]}" for dim, size in sizes if size == 1 and dim in values.coords]
    shape = tuple(size for _, size in sizes)
    chosen = {}
    for (dim, size), at in zip(sizes, np.unravel_index(places.values, shape), strict=True):
        labels = index(values, dim)
        if size > 1 and labels.dtype.kind in "iuf":
            chosen[dim] = places.copy(data=labels[at].astype(float)).where(judged.notnull().any("_rest"))
    return flat.isel(_rest=places), said, chosen


def _mean(
    values: xr.DataArray, dataset: xr.Dataset, outer: str, x: Hashable
) -> tuple[xr.DataArray, xr.DataArray | None, xr.DataArray | None, str]:
    """The mean over pairs, its interval where that is quickly made, and what to say of it."""
    if x == "position" and not means_by_position(dataset):
        raise InputError("a mean over prompts by position has no meaning: their tokens differ; draw one with --pair")
    said = f"mean of {values.sizes[outer]} {outer}s"
    kept = values.reset_coords(drop=True)
    if values.size <= _MOST_NUMBERS:
        means = mean_effects(kept.rename({outer: "pair"}) if outer != "pair" else kept, resamples=RESAMPLES)
        return means["mean"], means["low"], means["high"], said
    return kept.mean(outer, dtype=np.float64), None, None, said


def _details(
    details: Mapping[str, xr.DataArray], values: xr.DataArray, outer: str, pair: Which, count: int, names: Sequence[str]
) -> dict[str, xr.DataArray]:
    """What else lies along the cells: of one pair as it is, of a mean the means of numbers and the first texts."""
    told: dict[str, xr.DataArray] = {}
    for name, part in details.items():
        if outer in part.dims and (pair != "mean" or count == 1):
            told[name] = part.isel({outer: 0 if pair == "mean" else pair})
        elif outer not in part.dims:
            told[name] = part
        elif part.dtype.kind in "fiub":
            told[f"{name}, mean"] = part.mean(outer, skipna=True)
        elif len(names) == part.sizes[outer]:
            rows = part.transpose(outer, ...).values.reshape(len(names), -1)
            texts = np.array(["; ".join(_quoted(names, rows[:, at])) for at in range(rows.shape[1])], dtype=object)
            rest = part.isel({outer: 0}, drop=True)
            told["texts"] = rest.copy(data=texts.reshape(rest.shape))
    kept = {
        name: part.squeeze([dim for dim in part.dims if dim not in values.dims and part.sizes[dim] == 1])
        for name, part in told.items()
    }
    return {name: part.load() for name, part in kept.items() if dict(part.sizes) == dict(values.sizes)}


def _quoted(names: Sequence[str], texts: np.ndarray) -> list[str]:
    said = [
        f"{name.partition(': ')[2] or name}: “{short(str(text), _LONGEST)}”"
        for name, text in zip(names, texts, strict=True)
        if quoted_value(text)
    ]
    return said[:_TEXTS] + ([f"and {len(said) - _TEXTS} more"] if len(said) > _TEXTS else [])


def _base(dataset: xr.Dataset, metric: str) -> float:
    if metric.split("_")[0] != "effect" and f"{metric}_base" in dataset:
        base = dataset[f"{metric}_base"]
        if base.ndim == 0 and np.isfinite(base):
            return float(base)
    return 0.0


def _columns(dataset: xr.Dataset, values: xr.DataArray, dim: Hashable) -> list[str]:
    """The labels along a dim: positions by their tokens and places, as far as all pairs drawn have them in common."""
    labels = [str(item) for item in index(values, str(dim))]
    if dim != "position":
        return labels
    tokens, places = (_common(dataset.coords.get(name), dim) for name in ("token_text", "token_position"))
    if tokens is None:
        return labels
    found = []
    for at, (label, text) in enumerate(zip(labels, tokens, strict=True)):
        place = label if places is None else places[at]
        found.append(label if text is None else visible(str(text)) if place is None else token_label(str(text), place))
    return found


def _common(labels: xr.DataArray | None, dim: Hashable) -> list[Any] | None:
    """The labels along a dim, None where pairs differ; None as a whole where there are no labels of this dim."""
    if labels is None or dim not in labels.dims or labels.ndim > 2:
        return None
    rows = np.atleast_2d(labels.transpose(..., dim).values)
    return [column[0] if (column == column[0]).all() else None for column in rows.T]


def _grid(values: xr.DataArray) -> np.ndarray:
    return np.atleast_2d(np.asarray(values.values, dtype=np.float64))
