"""What a report draws: grids of numbers with their labels, prepared from a store's groups.

A panel is plain data, so that the page (and a test) can check it against the store. The mean over pairs comes first,
with a bootstrap interval where there are several; each pair follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

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
_MOST_PAIRS = 100
_MOST_CELLS = 60_000  # of one grid
_MOST_NUMBERS = 300_000  # of all grids of a panel: about 2 MB of a page

Cell = float | str | None
Grid = list[list[float | None]]


@dataclass(frozen=True)
class Layer:
    """One grid of a panel: its name, values by row and column, and what is shown beside each cell.

    ``columns`` are its own column labels, where they differ from the panel's (each prompt has its tokens).
    """

    name: str
    values: Grid
    low: Grid | None = None
    high: Grid | None = None
    details: dict[str, list[list[Cell]]] = field(default_factory=dict)
    columns: list[str] | None = None


@dataclass(frozen=True)
class Panel:
    """A heatmap: what it shows, its labels, and one or more layers of values."""

    title: str
    variable: str
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


def same_scale(runs: list[list[Panel]]) -> list[list[Panel]]:
    """Panels of one variable in the same units get one scale, within a run and across runs."""
    reach: dict[tuple[str, str], float] = {}
    for panel in (panel for panels in runs for panel in panels):
        key = (panel.variable, panel.units)
        reach[key] = max(reach.get(key, 0.0), panel.reach)
    return [[replace(panel, reach=reach[panel.variable, panel.units]) for panel in panels] for panels in runs]


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


def _panel(tree: xr.DataTree, group: str, dataset: xr.Dataset) -> Panel | None:
    values = _main(dataset)
    if values is None:
        return None
    y = next((dim for dim in _Y if values.sizes.get(dim, 0) > 1), None)
    x = next((dim for dim in _X if dim != y and values.sizes.get(dim, 0) > 1), None)
    if x is None:
        x, y = y, None
    if x is None:
        return None
    outer = next((dim for dim in _OUTER if dim in values.dims), None)
    cells = values.sizes[x] * (values.sizes[y] if y else 1)
    if cells > _MOST_CELLS:
        return None
    rest = [str(dim) for dim in values.dims if dim not in (x, y, outer)]
    values, note = _folded(values.load(), rest)
    values = values.transpose(*(dim for dim in (outer, y, x) if dim is not None))
    details = {} if any(dataset.sizes[dim] > 1 for dim in rest) else _details(tree, group, values)
    columns = _columns(_tokens(tree, dataset, values), values, x, outer)
    shown = 0
    if outer is not None:
        shown = min(values.sizes[outer], _MOST_PAIRS, max(1, _MOST_NUMBERS // (cells * (1 + len(details)))))
        if shown < values.sizes[outer]:
            note = "; ".join(part for part in (note, f"the first {shown} of {values.sizes[outer]} {outer}s") if part)
    layers = _layers(tree, values, outer, y, details, columns, shown)
    finite = np.array([cell for layer in layers for row in layer.values for cell in row if cell is not None])
    first = columns[0]
    same = all(labels == first for labels in columns)
    return Panel(
        title=f"{group.replace('/', ': ')}, {values.name}", variable=str(values.name),
        meaning=str(values.attrs.get("long_name", values.name)),
        units="" if values.attrs.get("units") in (None, "1") else str(values.attrs["units"]),
        y=y or "", x="multiplier" if x == "direction" and "multiplier" in values.coords else x,
        rows=[str(label) for label in values[y].values] if y else [""],
        columns=first if same else [str(label) for label in _index(values, x)],
        centre=0.0,
        reach=float(np.abs(finite).max()) if finite.size and np.abs(finite).max() > 0 else 1.0,
        layers=layers, note=note,
    )  # fmt: skip


def _folded(values: xr.DataArray, rest: list[str]) -> tuple[xr.DataArray, str]:
    """The strongest value along dims that are not drawn."""
    wide = [dim for dim in rest if values.sizes[dim] > 1]
    for dim in rest:
        places = abs(values).fillna(-1.0).argmax(dim)
        values = values.isel({dim: places}).drop_vars(dim, errors="ignore")
    note = "; ".join(f"the strongest {dim} in each cell" for dim in wide)
    return values, note


def _layers(
    tree: xr.DataTree,
    values: xr.DataArray,
    outer: str | None,
    y: str | None,
    details: dict[str, xr.DataArray],
    columns: list[list[str]],
    shown: int,
) -> list[Layer]:
    if outer is None:
        return [Layer("", _grid(values, y), details={name: _plain(part, y) for name, part in details.items()})]
    count = values.sizes[outer]
    names = _names(tree, values, outer)
    same = all(labels == columns[0] for labels in columns)
    each = [
        Layer(
            names[row],
            _grid(values.isel({outer: row}), y),
            details={name: _plain(part.isel({outer: row}), y) for name, part in details.items()},
            columns=None if same else columns[row],
        )
        for row in range(shown)
    ]
    # Position 3 of one prompt is not position 3 of another, unless they are pairs made from one template.
    tokens_known = len(columns) > 1 or not columns[0][0].isdigit()
    if count == 1 or (outer == "prompt" and values.dims[-1] == "position" and not (same and tokens_known)):
        return each
    found = mean_effects(values.rename({outer: "pair"}) if outer != "pair" else values, resamples=500)
    mean = Layer(
        f"mean over {count} {outer}s", _grid(found["mean"], y), _grid(found["low"], y), _grid(found["high"], y)
    )
    return [mean, *each]


def _names(tree: xr.DataTree, values: xr.DataArray, outer: str) -> list[str]:
    """What each pair or prompt is called: its number with its name, its source and template, or its text."""
    inputs = tree["inputs"].to_dataset() if "inputs" in tree.children else xr.Dataset()
    labels = [f"{outer} {label}" for label in values[outer].values]
    parts = [values.coords[name] for name in ("source", "template", "set") if name in values.coords]
    if not parts:
        found = next((inputs[name] for name in ("pair_name", "text") if name in inputs), None)
        parts = [] if found is None else [found]
    parts = [part for part in parts if part.dims == (outer,) and part.size == len(labels)]
    texts = [" · ".join(str(part.values[row]) for part in parts) for row in range(len(labels))]
    return [f"{label}: {_short(text)}" if text else label for label, text in zip(labels, texts, strict=True)]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"


def _details(tree: xr.DataTree, group: str, values: xr.DataArray) -> dict[str, xr.DataArray]:
    """What else lies along the same cells: receipts, a lens's most likely tokens, the text that a patch gave."""
    found: dict[str, xr.DataArray] = {}
    for name, source in _sources(tree, group):
        array = source.squeeze(
            [dim for dim in source.dims if source.sizes[dim] == 1 and dim not in values.dims], drop=True
        )
        if set(array.dims) == set(values.dims) and all(array.sizes[dim] == values.sizes[dim] for dim in array.dims):
            found[name] = array.load().transpose(*values.dims)
    return found


def _sources(tree: xr.DataTree, group: str) -> Iterator[tuple[str, xr.DataArray]]:
    top, _, component = group.partition("/")
    if top != "effects":
        return
    receipts = _group(tree, f"receipts/{component}")
    for name, label in (("change_norm", "changed by"), ("fired", "writes")):
        if name in receipts:
            yield label, receipts[name].where(receipts[name] >= 0).astype(float)
    tops = _group(tree, "effects/top") if component == "lens" else xr.Dataset()
    if {"token_text", "token_prob"} <= set(tops) and "token" in tops["token_text"].dims:
        for rank in range(min(3, tops.sizes["token"])):
            yield f"top {rank + 1}", tops["token_text"].isel(token=rank, drop=True)
            yield f"p {rank + 1}", tops["token_prob"].isel(token=rank, drop=True)
    texts = _group(tree, "generations")
    name = "text" if component == "patch" else f"text_{component}"
    if name in texts:
        yield "text", texts[name]


def _group(tree: xr.DataTree, path: str) -> xr.Dataset:
    try:
        return tree[path].to_dataset()
    except KeyError:
        return xr.Dataset()


def _plain(values: xr.DataArray, y: str | None) -> list[list[Cell]]:
    """Numbers as in `_grid`; texts with their spaces visible."""
    if values.dtype.kind in "fiub":
        return [list(row) for row in _grid(values, y)]
    rows = np.atleast_2d(values.values)
    return [[_shown(str(cell)) or None for cell in row] for row in rows]


def _grid(values: xr.DataArray, y: str | None) -> Grid:
    """Numbers of four digits; None where there is none."""
    array = (
        np.atleast_2d(np.asarray(values.values, dtype=np.float64)) if y is None else np.asarray(values.values, float)
    )
    return [[float(f"{cell:.4g}") if np.isfinite(cell) else None for cell in row] for row in array]


def _index(values: xr.DataArray, x: str) -> Any:
    if x == "direction" and "multiplier" in values.coords:
        return values["multiplier"].values
    return values[x].values if x in values.coords else np.arange(values.sizes[x])


def _tokens(tree: xr.DataTree, dataset: xr.Dataset, values: xr.DataArray) -> xr.DataArray | None:
    """The tokens at the positions: of the group itself, else of the inputs where these have the same positions."""
    if "token_text" in dataset.coords:
        return dataset["token_text"]
    texts = _group(tree, "inputs").get("token_text")
    if texts is None or any(texts.sizes[dim] != values.sizes.get(dim) for dim in texts.dims):
        return None
    same = all(np.array_equal(texts[dim].values, values[dim].values) for dim in texts.dims)
    return texts if same else None


def _columns(texts: xr.DataArray | None, values: xr.DataArray, x: str, outer: str | None) -> list[list[str]]:
    """The column labels of each pair or prompt (one list where there are none): tokens with their positions."""
    labels = [str(label) for label in _index(values, x)]
    if x != "position" or texts is None or x not in texts.dims or set(texts.dims) - {x, outer}:
        return [labels]
    rows = texts.transpose(..., x).values.reshape(-1, len(labels))
    found = []
    for row in rows:
        shown = [_shown(str(text)) for text in row]
        found.append([f"{text} {label}" if text else label for text, label in zip(shown, labels, strict=True)])
    return found


def _shown(text: str) -> str:
    """A token with its spaces visible."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text.replace(" ", "␣"))
