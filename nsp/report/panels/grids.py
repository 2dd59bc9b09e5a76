"""Drawings of any run, by its labels alone: a heatmap a group of results, or a line where there is one dim to draw.

The mean over pairs comes first, with a bootstrap interval where there are several; each pair follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.report.panels import labels
from nsp.report.panels.charts import averaged, chart
from nsp.report.panels.details import averaged_details, details, plain
from nsp.report.panels.shapes import Chart, Drawing, Grid, Layer, Panel, View, numbers, said
from nsp.statistics import mean_effects

GROUPS = ("effects", "attribution", "circuit", "generations")
_OUTER = ("pair", "prompt")
_MAIN = (
    "effect",
    "success",
    "change",
    "indirect_effect",
    "contribution",
    "perplexity",
)  # drawn in place of the first that fits
_Y = ("layer", "sender")
_X = ("position", "target_layer", "head", "receiver", "neuron", "component", "direction")
_LINE = ("layer", "multiplier")  # a single dim of these is a line, not a row of cells
_FOLDED = ("position", "head", "neuron", "component", "direction")  # dims whose strongest place a cell may show
_MOST_PAIRS = 100
_MOST_CELLS = 60_000  # of one grid
_MOST_NUMBERS = 300_000  # of all grids of a panel: about 2 MB of a page


def panels_of(tree: xr.DataTree, only: Sequence[str] | None = None) -> list[Drawing]:
    """A drawing of the main variable of every group of results that has layers, positions, heads or neurons.

    Groups whose variable lies along layers alone, in the same units, stand in one chart. ``only`` names groups
    (``effects/z``) to draw in place of all.
    """
    found: list[Drawing] = []
    lines: dict[tuple[str, str, str], dict[str, xr.DataArray]] = {}
    for path, dataset in _groups(tree):
        if only is not None and path not in only:
            continue
        values = main_variable(dataset)
        if values is None:
            continue
        y, x = _axes(values)
        name = _axis_name(values, x)
        if y is None and name in _LINE:
            key = (str(values.name), str(values.attrs.get("units", "1")), x)
            lines.setdefault(key, {})[path] = values
        else:
            panel = grid_panel(tree, path, dataset, values)
            found += [] if panel is None else [panel]
    return [*(_lines(tree, *key, parts) for key, parts in lines.items()), *found]


def _groups(tree: xr.DataTree) -> Iterator[tuple[str, xr.Dataset]]:
    for top in GROUPS:
        if top not in tree.children:
            continue
        for node in tree[top].subtree:
            dataset = node.to_dataset(inherit=True)
            if dataset.data_vars:
                yield node.path.strip("/"), dataset


def main_variable(dataset: xr.Dataset) -> xr.DataArray | None:
    """The variable to draw: the normalised effect, else the first number that has sites to lie along.

    A variable along steps, vocabulary or components by name is no grid of sites, nor is a vector of a direction.
    """
    fits = [
        array
        for array in [*dataset.data_vars.values(), *_success(dataset)]
        if array.dtype.kind == "f"
        and array.name != "vector"
        and not {"step", "token"} & {dim for dim in array.dims if array.sizes[dim] > 1}
        and any(array.sizes.get(dim, 0) > 1 for dim in (*_Y, *_X))
        and (set(array.dims) & {*_Y, "position"} or "multiplier" in array.coords)
    ]
    return min(fits, key=lambda array: _MAIN.index(array.name) if array.name in _MAIN else len(_MAIN), default=None)


def _success(dataset: xr.Dataset) -> list[xr.DataArray]:
    """A patchscope's match as 1 (partial or strong) or 0; its mean over sources is the share that succeeds."""
    if "match" not in dataset or dataset["match"].dtype.kind not in "iu":
        return []
    match = dataset["match"]
    found = (match >= 1).astype(float).where(match >= 0).rename("success")
    return [found.assign_attrs(long_name="partial or strong match of the answer (1) or none (0)", units="1")]


def _axes(values: xr.DataArray) -> tuple[str | None, str]:
    """What lies along y and x; y is None where one dim alone is wide."""
    y = next((dim for dim in _Y if values.sizes.get(dim, 0) > 1), None)
    x = next((dim for dim in _X if dim != y and values.sizes.get(dim, 0) > 1), None)
    return (y, x) if x is not None else (None, str(y))


def _axis_name(values: xr.DataArray, dim: str) -> str:
    return "multiplier" if dim == "direction" and "multiplier" in values.coords else dim


def _lines(tree: xr.DataTree, variable: str, units: str, x: str, parts: dict[str, xr.DataArray]) -> Chart:
    """One chart of the groups whose variable lies along one dim: the means with their intervals, then each pair."""
    first = next(iter(parts.values()))
    outer = next((dim for dim in _OUTER if dim in first.dims), None)
    flat = {}
    for path, values in parts.items():
        single = [dim for dim in values.dims if dim not in (x, outer)]
        flat[path.partition("/")[2] or path] = values.load().isel(dict.fromkeys(single, 0), drop=True)
    count = 0 if outer is None else first.sizes[outer]
    views = [
        View(f"mean over {count} {outer}s" if count > 1 else "", [averaged(name, one, x) for name, one in flat.items()])
    ]
    if count > 1:
        for row, name in enumerate(labels.names(tree, first, str(outer))[:_MOST_PAIRS]):
            views.append(
                View(
                    name,
                    [averaged(key, one.isel({outer: row}), x) for key, one in flat.items() if row < one.sizes[outer]],
                )
            )
    top = next(iter(parts)).partition("/")[0]
    title = f"{top}, {variable}" if len(flat) > 1 else f"{top}: {next(iter(flat))}, {variable}"
    meaning = str(first.attrs.get("long_name", variable))
    return chart(title, meaning, units, variable, _axis_name(first, x), views)


def grid_panel(
    tree: xr.DataTree, path: str, dataset: xr.Dataset, values: xr.DataArray, *, title: str = ""
) -> Panel | None:
    """A heatmap of one variable of a group; None where it has no dim to draw, or too many cells."""
    y, x = _axes(values)
    if values.sizes.get(x, 0) < 1:
        return None
    outer = next((dim for dim in _OUTER if dim in values.dims), None)
    cells = values.sizes[x] * (values.sizes[y] if y else 1)
    if cells > _MOST_CELLS:
        return None
    rest = [str(dim) for dim in values.dims if dim not in (x, y, outer)]
    values, note, chosen = _folded(values.load(), rest)
    values = values.transpose(*(dim for dim in (outer, y, x) if dim is not None))
    if chosen:
        beside = {name: places.transpose(*values.dims) for name, places in chosen.items()}
    else:
        beside = {} if any(dataset.sizes[dim] > 1 for dim in rest) else details(tree, path, values)
    columns = labels.columns(labels.tokens(tree, dataset, values), values, x, outer)
    shown = 0
    if outer is not None:
        shown = min(values.sizes[outer], _MOST_PAIRS, max(1, _MOST_NUMBERS // (cells * (1 + len(beside)))))
        if shown < values.sizes[outer]:
            note = "; ".join(part for part in (note, f"the first {shown} of {values.sizes[outer]} {outer}s") if part)
    layers = _layers(tree, values, outer, beside, columns, shown)
    same = all(one == columns[0] for one in columns)
    name = str(values.name)
    rows = [str(label) for label in values[y].values] if y else [""]
    shared = columns[0] if same else [str(label) for label in labels.index(values, x)]
    return panel(
        title or f"{path.replace('/', ': ')}, {name}", str(values.attrs.get("long_name", name)), str(values.attrs.get("units", "1")),
        (y or "", _axis_name(values, x)), rows, shared, layers, variable=name, note=note,
    )  # fmt: skip


def panel(
    title: str,
    meaning: str,
    units: str,
    axes: tuple[str, str],
    rows: list[str],
    columns: list[str],
    layers: list[Layer],
    **options: Any,
) -> Panel:
    """A heatmap from its layers. ``axes`` are (y, x); ``options`` are other attributes of `Panel`."""
    units = "" if units == "1" else units
    finite = [abs(cell) for layer in layers for row in layer.values for cell in row if cell is not None]
    given = {"variable": title, "centre": 0.0, "reach": max(finite, default=0.0) or 1.0, **options}
    if "finding" not in given:
        given["finding"] = strongest(title, layers[0], rows, layers[0].columns or columns, *axes, units)
    return Panel(
        title=title,
        meaning=meaning,
        units=units,
        y=axes[0],
        x=axes[1],
        rows=rows,
        columns=columns,
        layers=layers,
        **given,
    )


def strongest(title: str, layer: Layer, rows: list[str], columns: list[str], y: str, x: str, units: str) -> str:
    """A sentence on the cell of a layer that lies farthest from zero."""
    grid = np.array(layer.values, dtype=np.float64)
    if not np.nansum(np.abs(grid)) > 0:
        return ""
    best = np.unravel_index(int(np.argmax(np.nan_to_num(np.abs(grid), nan=-1.0))), grid.shape)
    row, column = int(best[0]), int(best[1])
    low, high = (None if end is None else end[row][column] for end in (layer.low, layer.high))
    parts = [f"{y} {rows[row]}" if y else "", f"{x} {columns[column]}"]
    parts += [f"{dim} {layer.details[dim][row][column]:g}" for dim in _FOLDED if dim in layer.details]
    where = ", ".join(part for part in parts if part)
    named = f" ({layer.name})" if layer.name else ""
    return f"{title}: strongest at {where}: {said(layer.values[row][column], low, high, units)}{named}"


def _folded(values: xr.DataArray, rest: list[str]) -> tuple[xr.DataArray, str, dict[str, xr.DataArray]]:
    """The strongest value along dims that are not drawn, and which place along each it is."""
    wide = [dim for dim in rest if values.sizes[dim] > 1]
    chosen: dict[str, xr.DataArray] = {}
    for dim in rest:
        places = abs(values).fillna(-1.0).argmax(dim)
        taken = {name: part.isel({dim: places}) if dim in part.dims else part for name, part in chosen.items()}
        if dim in wide:
            taken[dim] = xr.DataArray(
                labels.index(values, dim)[places.values].astype(float), places.coords, places.dims
            )
        values = values.isel({dim: places}).drop_vars(dim, errors="ignore")
        chosen = {name: part.where(values.notnull()) for name, part in taken.items()} if taken else {}
    note = "; ".join(f"the strongest {dim} in each cell" for dim in wide)
    return values, note, chosen


def _layers(
    tree: xr.DataTree,
    values: xr.DataArray,
    outer: str | None,
    beside: dict[str, xr.DataArray],
    columns: list[list[str]],
    shown: int,
) -> list[Layer]:
    if outer is None:
        return [Layer("", _grid(values), details={name: plain(part) for name, part in beside.items()})]
    count = values.sizes[outer]
    names = labels.names(tree, values, outer)
    same = all(one == columns[0] for one in columns)
    each = [
        Layer(
            names[row],
            _grid(values.isel({outer: row})),
            details={name: plain(part.isel({outer: row})) for name, part in beside.items()},
            columns=None if same else columns[row],
        )
        for row in range(shown)
    ]
    # Position 3 of one prompt is not position 3 of another, unless they are pairs made from one template.
    tokens_known = len(columns) > 1 or not columns[0][0].isdigit()
    if count == 1 or (outer == "prompt" and values.dims[-1] == "position" and not (same and tokens_known)):
        return each
    found = mean_effects(values.rename({outer: "pair"}) if outer != "pair" else values, resamples=500)
    told = {name: part for name, part in beside.items() if name not in _FOLDED}
    mean = Layer(
        f"mean over {count} {outer}s", _grid(found["mean"]), _grid(found["low"]), _grid(found["high"]),
        details={name: plain(part) for name, part in averaged_details(told, outer, names).items()},
    )  # fmt: skip
    return [mean, *each]


def _grid(values: Any) -> Grid:
    """Numbers of four digits; None where there is none."""
    return [numbers(row) for row in np.atleast_2d(np.asarray(values.values, dtype=np.float64))]
