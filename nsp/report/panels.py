"""What a report draws: grids of numbers with their labels, prepared from a store's groups.

A panel is plain data, so that the page (and a test) can check it against the store. The mean over pairs comes first,
with a bootstrap interval where there are several; each pair follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from nsp.statistics import mean_effects

GROUPS = ("effects", "attribution", "circuit", "generations")
_OUTER = ("pair", "prompt")
_Y = ("layer", "sender")
_X = ("position", "target_layer", "head", "receiver", "neuron", "component", "direction")
_MOST_PAIRS = 100
_MOST_CELLS = 60_000

Grid = list[list[float | None]]


@dataclass(frozen=True)
class Layer:
    """One grid of a panel: its name, values by row and column, and numbers shown beside each cell."""

    name: str
    values: Grid
    low: Grid | None = None
    high: Grid | None = None
    details: dict[str, Grid] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """A heatmap: what it shows, its labels, and one or more layers of values."""

    title: str
    meaning: str
    units: str
    y: str
    x: str
    rows: list[str]
    columns: list[str]
    centre: float
    reach: float
    layers: list[Layer]
    note: str = ""


def panels_of(tree: xr.DataTree) -> list[Panel]:
    """A panel for the main variable of every group of results that has layers, positions, heads or neurons."""
    return [panel for group, dataset in _groups(tree) if (panel := _panel(tree, group, dataset)) is not None]


def _groups(tree: xr.DataTree) -> Iterator[tuple[str, xr.Dataset]]:
    for top in GROUPS:
        if top not in tree.children:
            continue
        for node in tree[top].subtree:
            dataset = node.to_dataset(inherit=True)
            if dataset.data_vars:
                yield node.path.strip("/"), dataset


def _main(dataset: xr.Dataset) -> xr.DataArray | None:
    """The variable to draw: the normalised effect, else the first number that has something to lie along."""
    fits = [
        array
        for array in dataset.data_vars.values()
        if array.dtype.kind == "f" and any(array.sizes.get(dim, 0) > 1 for dim in (*_Y, *_X))
    ]
    return next((array for array in fits if array.name == "effect"), fits[0] if fits else None)


def _panel(tree: xr.DataTree, group: str, dataset: xr.Dataset) -> Panel | None:
    values = _main(dataset)
    if values is None:
        return None
    values = values.load()
    y = next((dim for dim in _Y if values.sizes.get(dim, 0) > 1), None)
    x = next((dim for dim in _X if values.sizes.get(dim, 0) > 1), None)
    if x is None:
        x, y = y, None
    if x is None:
        return None
    outer = next((dim for dim in _OUTER if dim in values.dims), None)
    rest = [str(dim) for dim in values.dims if dim not in (x, y, outer)]
    values, note = _folded(values, rest)
    if values.size // (values.sizes[outer] if outer else 1) > _MOST_CELLS:
        return None
    order = [dim for dim in (outer, y, x) if dim is not None]
    values = values.transpose(*order)
    layers = _layers(values, outer, y, _receipts(tree, group, values, rest))
    finite = np.array([cell for layer in layers for row in layer.values for cell in row if cell is not None])
    centre = 0.0
    reach = float(np.abs(finite).max()) if finite.size and np.abs(finite).max() > 0 else 1.0
    return Panel(
        title=f"{group.replace('/', ': ')}, {values.name}",
        meaning=str(values.attrs.get("long_name", values.name)),
        units="" if values.attrs.get("units") in (None, "1") else str(values.attrs["units"]),
        y=y or "", x=x,
        rows=[str(label) for label in values[y].values] if y else [""],
        columns=_columns(dataset, values, x),
        centre=centre, reach=reach, layers=layers, note=note,
    )  # fmt: skip


def _folded(values: xr.DataArray, rest: list[str]) -> tuple[xr.DataArray, str]:
    """The strongest value along dims that are not drawn."""
    wide = [dim for dim in rest if values.sizes[dim] > 1]
    for dim in rest:
        places = abs(values).fillna(-1.0).argmax(dim)
        values = values.isel({dim: places}).drop_vars(dim, errors="ignore")
    note = "; ".join(f"the strongest {dim} in each cell" for dim in wide)
    return values, note


def _layers(values: xr.DataArray, outer: str | None, y: str | None, details: dict[str, xr.DataArray]) -> list[Layer]:
    if outer is None:
        return [Layer("", _grid(values, y), details={name: _grid(part, y) for name, part in details.items()})]
    count = values.sizes[outer]
    named = {int(label): f"{outer} {label}" for label in values[outer].values}
    each = [
        Layer(
            named[int(values[outer].values[row])],
            _grid(values.isel({outer: row}), y),
            details={name: _grid(part.isel({outer: row}), y) for name, part in details.items()},
        )
        for row in range(min(count, _MOST_PAIRS))
    ]
    if count == 1:
        return each
    found = mean_effects(values.rename({outer: "pair"}) if outer != "pair" else values, resamples=500)
    mean = Layer(f"mean over {count} {outer}s", _grid(found["mean"], y), _grid(found["low"], y), _grid(found["high"], y))
    return [mean, *each]


def _receipts(tree: xr.DataTree, group: str, values: xr.DataArray, rest: list[str]) -> dict[str, xr.DataArray]:
    """The receipts that lie along the same cells: what the intervention changed there."""
    path = group.replace("effects", "receipts", 1)
    if rest or not group.startswith("effects") or path.split("/")[0] not in tree.children:
        return {}
    try:
        receipts = tree[path].to_dataset()
    except KeyError:
        return {}
    found = {}
    for name, label in (("change_norm", "changed by"), ("fired", "writes")):
        if name in receipts and set(receipts[name].dims) == set(values.dims):
            found[label] = receipts[name].load().transpose(*values.dims).astype(float)
    return found


def _grid(values: xr.DataArray, y: str | None) -> Grid:
    """Numbers of four digits; None where there is none."""
    array = np.atleast_2d(np.asarray(values.values, dtype=np.float64)) if y is None else np.asarray(values.values, float)
    return [[float(f"{cell:.4g}") if np.isfinite(cell) else None for cell in row] for row in array]


def _columns(dataset: xr.Dataset, values: xr.DataArray, x: str) -> list[str]:
    labels = [str(label) for label in values[x].values] if x in values.coords else [str(n) for n in range(values.sizes[x])]
    if x != "position" or "token_text" not in dataset.coords:
        return labels
    texts: Any = dataset["token_text"]
    if texts.ndim == 1:
        return [f"{_shown(str(text))} {label}" for text, label in zip(texts.values, labels, strict=True)]
    rows = np.asarray(texts.values).reshape(-1, texts.shape[-1])
    found = []
    for column, label in enumerate(labels):
        distinct = {str(text) for text in rows[:, column] if text != ""}
        found.append(f"{_shown(distinct.pop())} {label}" if len(distinct) == 1 else label)
    return found


def _shown(text: str) -> str:
    """A token with its spaces visible."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text.replace(" ", "␣"))
