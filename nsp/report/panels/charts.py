"""Helpers that make the series of a chart from labelled arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from nsp.report.panels.labels import index
from nsp.report.panels.shapes import Chart, Form, Series, View, numbers, said
from nsp.statistics import mean_effects

_RESAMPLES = 500
_MOST_POINTS = 1200  # of one cloud


def averaged(
    name: str, values: xr.DataArray, x: str, form: Form = "line", labels: Sequence[str] | None = None
) -> Series:
    """A series of means over pairs or prompts (the one other dim) with their intervals, or of the values themselves."""
    outer = next((str(dim) for dim in values.dims if dim != x), None)
    places = [float(place) for place in index(values, x)]
    told = None if labels is None else list(labels)
    if outer is None:
        return Series(name, places, numbers(values.values), labels=told, form=form)
    found = mean_effects(values.rename({outer: "pair"}) if outer != "pair" else values, resamples=_RESAMPLES)
    low, high = (numbers(found[end].values) for end in ("low", "high"))
    some = any(end is not None for end in low)
    mean = numbers(found["mean"].values)
    return Series(name, places, mean, low if some else None, high if some else None, told, form)


def by_layer(name: str, values: xr.DataArray, unit: str, told: Callable[[int, int], str] | None = None) -> Series:
    """Units as points over their layers, those far from zero only: x is the layer, plus the unit's place between two.

    ``values`` has the dims (layer, unit). ``told`` says more of a unit, from its row and place.
    """
    grid = np.asarray(values.transpose("layer", unit).values, dtype=np.float64)
    flat = np.where(np.isfinite(grid), np.abs(grid), -1.0).reshape(-1)
    chosen = np.sort(np.argsort(-flat, kind="stable")[:_MOST_POINTS])
    chosen = chosen[flat[chosen] > 0]
    rows, places = np.unravel_index(chosen, grid.shape)
    layers, units = values["layer"].values[rows], values[unit].values[places]
    # Points of one layer spread over 0.8 of the room to the next one.
    across = layers + 0.8 * (places / max(1, grid.shape[1] - 1) - 0.5)
    labels = [
        f"layer {layer}, {unit} {one}" + (f", {told(int(row), int(place))}" if told else "")
        for layer, one, row, place in zip(layers, units, rows, places, strict=True)
    ]
    return Series(
        name, [float(f"{place:.5g}") for place in across], numbers(grid[rows, places]), labels=labels, form="points"
    )


def spread(count: int, *scores: Any) -> np.ndarray:
    """Places of a cloud's points to draw: all of few; of many the largest by any of the scores, and some of the rest."""
    if count <= _MOST_POINTS:
        return np.arange(count)
    kept: set[int] = set()
    for score in scores:
        size = np.nan_to_num(np.abs(np.asarray(score, dtype=np.float64).reshape(-1)), nan=-1.0)
        kept |= set(np.argsort(-size, kind="stable")[: _MOST_POINTS // (2 * len(scores))].tolist())
    rest = np.random.default_rng(0).permutation(count)
    kept |= set(rest[: _MOST_POINTS - len(kept)].tolist())
    return np.array(sorted(kept))


def chart(title: str, meaning: str, units: str, y: str, x: str, views: Sequence[View], **options: Any) -> Chart:
    """A chart whose finding, unless one is given ("" for none), is its first view's largest value.

    Layers are whole numbers along x, and so get no ticks between them.
    """
    options = {"whole": x.endswith("layer"), **options}
    made = Chart(
        title, meaning, "" if units == "1" else units, y, x, [view for view in views if view.series], **options
    )
    return made if "finding" in options or not made.views else replace(made, finding=_largest(made))


def _largest(made: Chart) -> str:
    view = made.views[0]
    best: tuple[float, str] = (-1.0, "")
    for series in view.series:
        for at, value in enumerate(series.y):
            if value is not None and abs(value) > best[0]:
                low, high = (None if end is None else end[at] for end in (series.low, series.high))
                where = (
                    series.labels[at].partition("; ")[0] if series.labels else f"{made.x} {_place(made, series.x[at])}"
                )
                place = f"{series.name}, {where}" if len(view.series) > 1 else where
                best = abs(value), f"{made.title}: largest at {place}: {said(value, low, high, made.units)}"
    named = f" ({view.name})" if view.name and best[1] else ""
    return best[1] + named


def _place(made: Chart, x: float) -> str:
    return made.ticks[int(x)] if made.ticks else f"{x:g}"
