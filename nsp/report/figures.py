"""Figures of results: the heatmap of a sweep, layers against positions (or heads, or neurons).

Colours diverge from the value of "nothing changed": 0 for normalised effects, the base run's value for a raw metric,
and reach equally far on both sides, so that white always means no effect. The map is RdBu, which people with the common
forms of colour blindness can read. Cells without a value are hatched grey, never white.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Rectangle

from nsp.errors import InputError
from nsp.recipe_errors import suggestion

AXES = ("layer", "position", "head", "neuron")
_LONGEST_LABEL = 16
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans",
    "Arial Unicode MS",
    "PingFang SC",
    "Microsoft YaHei",
)


def heatmap(
    dataset: xr.Dataset,
    metric: str = "effect",
    pair: int = 0,
    *,
    base: float | None = None,
    units: Mapping[str, int] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one variable of a sweep for one pair.

    Args:
        dataset: a component's effects, with some of the dims (pair, layer, position, head | neuron); a coordinate
            ``token_text`` on (pair, position) or (position) labels the positions.
        metric: the variable.
        pair: which pair (or prompt, where a run has those), counted from 0.
        base: the value that means "nothing changed"; by default 0 for an effect, and ``<metric>_base`` for a raw metric
            where the dataset has it (else 0).
        units: fixes heads or neurons: ``{"head": 3}``. A dim that is neither fixed nor drawn shows, in each cell, the
            value farthest from `base`.
        title: a line above; None for the metric's name.

    Returns:
        a Figure that no GUI or pyplot state knows of; ``figure.savefig("x.png")`` writes it.
    """
    values = _variable(dataset, metric)
    values, chosen = _one_pair(values, dataset, pair)
    values, fixed = _fix(values, units or {})
    centre = base if base is not None else _base(chosen, metric)
    x_dim, y_dim, rest = _drawn(values)
    values, folded = _strongest(values, rest, centre)
    values = values.transpose(y_dim, x_dim) if y_dim else values.transpose(x_dim)
    grid = np.atleast_2d(np.asarray(values.values, dtype=np.float64))
    labels = _labels(chosen, values, x_dim)
    rows = [str(row) for row in values[y_dim].values] if y_dim else [""]
    shown = _with_token(grid, labels)
    grid, labels = grid[:, shown], [labels[index] for index in shown]

    heading = title or metric
    outer = _outer(dataset)
    remarks = [f"{outer} {pair}"] if outer in dataset[metric].dims and dataset.sizes[outer] > 1 else []
    remarks += fixed + folded + ([] if np.isfinite(grid).all() else ["hatched: no value"])
    heading = "\n".join([heading, ", ".join(remarks)]) if remarks else heading
    return _draw(grid, labels, rows, x_dim, y_dim, centre, meaning(dataset[metric], metric), heading)


def base_value(tree: xr.DataTree, metric: str, pair: int) -> float | None:
    """The base run's value of a metric, where a raw metric's colours diverge; None where the store does not say.

    ``inputs/base`` (pair) tells which prompt is the base run, ``baseline/<metric>_<prompt>`` (pair) what it gave.
    """
    if not {"inputs", "baseline"} <= set(tree.children):
        return None
    inputs, baseline = tree["inputs"].to_dataset(), tree["baseline"].to_dataset()
    if "base" not in inputs or not 0 <= pair < inputs["base"].size:
        return None
    name = f"{metric}_{inputs['base'].values[pair]}"
    value = float(baseline[name].values[pair]) if name in baseline else math.nan
    return value if math.isfinite(value) else None


def _variable(dataset: xr.Dataset, metric: str) -> xr.DataArray:
    drawable = [str(name) for name, variable in dataset.data_vars.items() if set(variable.dims) & set(AXES)]
    if not drawable:
        raise InputError(
            f"a heatmap needs one of {', '.join(AXES)}; these results lie along {', '.join(map(str, dataset.sizes))}: "
            "see nsp show and nsp report"
        )
    if metric not in drawable:
        raise InputError(f"there is no metric {metric!r} to draw{suggestion(metric, drawable)} ({', '.join(drawable)})")
    return dataset[metric]


def _one_pair(values: xr.DataArray, dataset: xr.Dataset, pair: int) -> tuple[xr.DataArray, xr.Dataset]:
    outer = _outer(dataset)
    count = dataset.sizes.get(outer, 1)
    if not 0 <= pair < count:
        raise InputError(
            f"there is no {outer} {pair}; the store has " + (f"{outer} 0 only" if count == 1 else f"0 to {count - 1}")
        )
    chosen = dataset.isel({outer: pair}) if outer in dataset.dims else dataset
    return (values.isel({outer: pair}) if outer in values.dims else values), chosen


def _outer(dataset: xr.Dataset) -> str:
    """The dim of which one is drawn: pairs, or prompts where a run has those."""
    return "prompt" if "prompt" in dataset.dims and "pair" not in dataset.dims else "pair"


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


def _strongest(values: xr.DataArray, rest: list[Hashable], centre: float) -> tuple[xr.DataArray, list[str]]:
    if not rest:
        return values, []
    sizes = [(str(dim), values.sizes[dim]) for dim in rest]
    flat = values.stack(_rest=rest, create_index=False)
    distance = abs(flat - centre).fillna(-1.0)
    names = [f"the strongest {dim} of {size} in each cell" for dim, size in sizes if size > 1]
    names += [f"{dim} {values[dim].values[0]}" for dim, size in sizes if size == 1 and dim in values.coords]
    return flat.isel(_rest=distance.argmax("_rest")), names


def _base(dataset: xr.Dataset, metric: str) -> float:
    if metric.split("_")[0] != "effect" and f"{metric}_base" in dataset:
        base = dataset[f"{metric}_base"]
        if base.ndim == 0 and np.isfinite(base):
            return float(base)
    return 0.0


def _labels(dataset: xr.Dataset, values: xr.DataArray, dim: Hashable) -> list[str]:
    index = values[dim].values if dim in values.coords else np.arange(values.sizes[dim])
    if dim == "position" and "token_position" in dataset.coords and dataset["token_position"].dims == (dim,):
        index = dataset["token_position"].values
    if dim != "position" or "token_text" not in dataset.coords or dataset["token_text"].dims != (dim,):
        return [str(item) for item in index]
    texts = dataset["token_text"].values
    return [f"{_token(str(text))}  {place}" if text else "" for text, place in zip(texts, index, strict=True)]


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """The fonts for token labels that this machine has, and the characters that they can show."""
    installed = {entry.name for entry in fontManager.ttflist}
    names = [name for name in _FONTS if name in installed]  # matplotlib brings DejaVu Sans
    files = [findfont(FontProperties(family=name)) for name in names]
    return names, frozenset(code for file in files for code in get_font(file).get_charmap())


def _token(text: str) -> str:
    """A token as a label: its spaces visible, what cannot be shown escaped, not too long."""
    known = _fonts()[1]
    text = text.replace(" ", "␣")
    shown = [
        char if char.isprintable() and ord(char) in known else char.encode("unicode_escape").decode("ascii")
        for char in text
    ]
    text = "".join(shown)
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _with_token(grid: np.ndarray, labels: list[str]) -> list[int]:
    """The columns of this pair: not the padding that other, longer pairs left behind."""
    columns = [index for index, label in enumerate(labels) if label or np.isfinite(grid[:, index]).any()]
    return columns or list(range(len(labels)))


def meaning(values: xr.DataArray, metric: str) -> str:
    """What a number is, with its units, for a label."""
    name, units = str(values.attrs.get("long_name", metric)), values.attrs.get("units")
    return name if units in (None, "", "1") else f"{name} [{units}]"


def _draw(
    grid: np.ndarray,
    labels: list[str],
    rows: list[str],
    x_dim: Hashable,
    y_dim: Hashable | None,
    centre: float,
    said: str,
    heading: str,
) -> Figure:
    height_count, width_count = grid.shape
    wide, tall = (0.34 if width_count <= 32 else 0.22), (0.22 if height_count <= 32 else 0.17)
    width = min(max(wide * width_count + 2.2, 5.0), 60.0)
    height = min(max(tall * height_count + 2.0, 3.2), 40.0)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    finite = np.abs(grid[np.isfinite(grid)] - centre)
    reach = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    missing: Any = Rectangle(
        (-0.5, -0.5), width_count, height_count, facecolor="0.85", edgecolor="0.6", hatch="////", lw=0, zorder=-1
    )
    axes.add_patch(missing)
    image = axes.imshow(
        np.ma.masked_invalid(grid),
        cmap="RdBu_r",
        norm=CenteredNorm(vcenter=centre, halfrange=reach),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    size = 8 if width_count <= 32 else 7
    every = max(1, math.ceil(width_count * 0.16 / (width - 2.0)))
    rotation = 90 if any(len(label) > 3 for label in labels) else 0
    style: Any = {"fontsize": size, "rotation": rotation, "parse_math": False, "fontfamily": _fonts()[0]}
    axes.set_xticks(range(0, width_count, every), labels[::every], **style)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if height_count / step <= 45)
    axes.set_yticks(range(0, height_count, step), rows[::step], fontsize=size)
    axes.set_xlabel(str(x_dim), fontsize=9)
    if y_dim is not None:
        axes.set_ylabel(str(y_dim), fontsize=9)
    else:
        axes.set_yticks([])
    axes.set_title(heading, fontsize=10, loc="left", parse_math=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=max(12, int(height * 4)))
    bar.set_label("\n".join(textwrap.wrap(said, int((height - 0.8) * 14))), fontsize=8, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure
