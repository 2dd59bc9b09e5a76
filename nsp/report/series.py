"""Series of charts from labelled arrays: means with intervals, units by layer, and which points of many are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from nsp.report.figures import Series
from nsp.report.labels import index
from nsp.report.site_panels import RESAMPLES
from nsp.statistics import mean_effects

MOST_POINTS = 1200  # of one cloud on a page


def mean_series(name: str, values: xr.DataArray, x: str, notes: Sequence[str] = ()) -> Series:
    """Means over pairs or prompts (the one dim besides `x`) with their intervals, or the values themselves; x ascends."""
    outer = next((str(dim) for dim in values.dims if dim != x), None)
    places = np.asarray(index(values, x), dtype=np.float64)
    order = np.argsort(places, kind="stable")
    told = tuple(notes[at] for at in order) if notes else ()
    if outer is None:
        return Series(name=name, x=places[order], y=np.asarray(values.values, dtype=np.float64)[order], notes=told)
    plain = values.reset_coords(drop=True)
    means = mean_effects(plain.rename({outer: "pair"}) if outer != "pair" else plain, resamples=RESAMPLES)
    mean, low, high = (np.asarray(means[end].values, dtype=np.float64)[order] for end in ("mean", "low", "high"))
    if not np.isfinite(low).any():
        return Series(name=name, x=places[order], y=mean, notes=told)
    return Series(name=name, x=places[order], y=mean, low=low, high=high, notes=told)


def units_by_layer(values: xr.DataArray, unit: str, told: Callable[[int, int], str] | None = None) -> Series:
    """Units as points over their layers, those far from zero only: x is the layer, plus the unit's place between two.

    ``values`` has the dims (layer, unit). ``told`` says more of a unit, from its row and place.
    """
    grid = np.asarray(values.transpose("layer", unit).values, dtype=np.float64)
    size = np.nan_to_num(np.abs(grid), nan=0.0).reshape(-1)
    chosen = np.sort(np.argsort(-size, kind="stable")[:MOST_POINTS])
    rows, places = np.unravel_index(chosen[size[chosen] > 0], grid.shape)
    layers, units = values["layer"].values[rows], values[unit].values[places]
    notes = tuple(
        f"layer {layer}, {unit} {label}" + (f", {told(int(row), int(place))}" if told else "")
        for layer, label, row, place in zip(layers, units, rows, places, strict=True)
    )
    return Series(name=unit, x=between_layers(layers, places, grid.shape[1]), y=grid[rows, places], notes=notes)


def between_layers(layers: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """x of units: those of one layer are spread over 0.8 of the room to the next one, by their places among `count`."""
    return np.asarray(layers + 0.8 * (places / max(1, count - 1) - 0.5), dtype=np.float64)


def thinned(count: int, *scores: np.ndarray) -> np.ndarray:
    """Places of a cloud's points to draw: all of few; of many the largest by any of the scores, and some of the rest."""
    if count <= MOST_POINTS:
        return np.arange(count)
    kept: set[int] = set()
    for score in scores:
        size = np.nan_to_num(np.abs(np.asarray(score, dtype=np.float64).reshape(-1)), nan=-1.0)
        kept |= set(np.argsort(-size, kind="stable")[: MOST_POINTS // (2 * len(scores))].tolist())
    rest = np.random.default_rng(0).permutation(count)
    kept |= set(rest[: MOST_POINTS - len(kept)].tolist())
    return np.array(sorted(kept))
