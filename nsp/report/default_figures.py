"""Figures of any run by its dims alone: heatmaps, bars of the strongest sites, and lines where only layers are wide.

`figures_by_dims` is what a kind of experiment shows that states no figures; kinds that do take parts of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from nsp.report.figures import Figure, Grid, Lines, View, Which
from nsp.report.labels import axis_name, group, item_names, meaning_and_units
from nsp.report.series import mean_series
from nsp.report.site_panels import (
    drawable,
    heatmap,
    main_variable,
    means_by_position,
    outer_dim,
    strongest_by_layer,
    wide_axes,
)

_GROUPS = ("effects", "attribution", "circuit", "generations")
_LINE = ("layer", "multiplier")  # a single wide dim of these is a line, not a row of cells
_MOST_PAIRS = 100  # of a chart of lines


def figures_by_dims(tree: xr.DataTree, only: Iterable[str] | None = None) -> list[Figure]:
    """A figure of the main variable of every group of results that has layers, positions, heads or neurons.

    Groups whose variable lies along layers alone, in the same units, are lines of one chart. ``only`` names groups
    (``effects/z``) to draw in place of all.
    """
    shown: list[Figure] = []
    lines: dict[tuple[str, str, str], dict[str, xr.DataArray]] = {}
    for path, dataset in _groups(tree, only):
        values = dataset[_main(dataset)]
        y, x = wide_axes(values)
        wide = y is not None or (x is not None and axis_name(values, x) not in _LINE)
        if not wide and x is not None:
            lines.setdefault((str(values.name), str(values.attrs.get("units", "1")), x), {})[path] = values
        if x is not None and path.startswith("effects/"):
            shown += site_figures(tree, path, in_report=wide)
        elif wide:
            shown.append(heatmap_figure(tree, path))
    return [*shown, *(_lines(tree, variable, x, parts) for (variable, _, x), parts in lines.items())]


def site_figures(tree: xr.DataTree, path: str, in_report: bool = True) -> list[Figure]:
    """The heatmap of one group and, where it has layers, the strongest site of each; the latter is not in the report."""
    dataset = with_tokens(tree, path)
    found = [heatmap_figure(tree, path, in_report=in_report)]
    if "layer" not in dataset[_main(dataset)].dims:
        return found
    floats = [name for name in drawable(dataset) if dataset[name].dtype.kind == "f" and "layer" in dataset[name].dims]
    views = [View(make=partial(strongest_by_layer, dataset, name), component=_component(path), metric=name) for name in floats]
    title = f"{path.replace('/', ': ')}, strongest site of each layer"
    return [*found, Figure(what="bars", title=title, views=tuple(views), in_report=False)]


def heatmap_figure(
    tree: xr.DataTree, path: str, dataset: xr.Dataset | None = None, *, title: str = "", in_report: bool = True
) -> Figure:
    """Heatmaps of a group's variables, the main one first: the mean over pairs or prompts, then each.

    ``dataset`` is drawn in place of the whole group, for instance a part of its rows.
    """
    dataset = with_tokens(tree, path) if dataset is None else dataset
    main = _main(dataset)
    outer = outer_dim(dataset)
    names = item_names(tree, dataset, outer) if outer in dataset.dims else [""]
    details = {label: _aligned(part, dataset) for label, part in _details(tree, path).items()}
    views = []
    for metric in sorted(drawable(dataset), key=lambda name: name != main):
        values = dataset[metric]
        along = outer in values.dims and len(names) > 1
        items: list[Which] = [*range(len(names))] if outer in values.dims else [0]
        if along and (wide_axes(values)[1] != "position" or means_by_position(dataset)):
            items = ["mean", *items]
        for item in items:
            name = f"mean over {len(names)} {outer}s" if item == "mean" else names[item] if outer in values.dims else ""

            make = partial(_heatmap, tree, dataset, metric, item, details=details, names=names)
            views.append(View(make=make, name=name, component=_component(path), metric=metric, item=item))
    return Figure(
        what="heatmap",
        title=title or f"{path.replace('/', ': ')}, {main}",
        views=tuple(views),
        in_report=in_report,
        no_mean="a mean over prompts by position has no meaning: their tokens differ; draw one with --pair",
    )


def _heatmap(
    tree: xr.DataTree, dataset: xr.Dataset, metric: str, item: Which, base: float | None = None, **options: Any
) -> Grid:
    if base is None and not metric.startswith("effect"):
        base = base_value(tree, metric, item)
    return heatmap(dataset, metric, item, base=base, **options)


def base_value(tree: xr.DataTree, metric: str, pair: Which) -> float | None:
    """The base run's value of a metric, where a raw metric's colours diverge; None where the store does not say.

    ``inputs/base`` (pair) tells which prompt is the base run, ``baseline/<metric>_<prompt>`` (pair) what it gave; of
    the mean over pairs it is the mean.
    """
    inputs, baseline = group(tree, "inputs"), group(tree, "baseline")
    if "base" not in inputs or (pair != "mean" and not 0 <= pair < inputs["base"].size):
        return None
    rows = range(inputs["base"].size) if pair == "mean" else [pair]
    names = [f"{metric}_{inputs['base'].values[row]}" for row in rows]
    found = [float(baseline[name].values[row]) for row, name in zip(rows, names, strict=True) if name in baseline]
    value = float(np.mean(found)) if found and len(found) == len(names) else np.nan
    return value if np.isfinite(value) else None


def with_tokens(tree: xr.DataTree, path: str) -> xr.Dataset:
    """A group's results; where its positions are those of the inputs, with the inputs' tokens as labels.

    A patchscope's ``match`` is there as ``success`` too: partial or strong is 1, none is 0.
    """
    dataset = tree[path].to_dataset()
    if "match" in dataset and dataset["match"].dtype.kind in "iu":
        match = dataset["match"]
        success = (match >= 1).astype(float).where(match >= 0)
        said = "partial or strong match of the answer (1) or none (0)"
        dataset = dataset.assign(success=success.assign_attrs(long_name=said, units="1"))
    texts = group(tree, "inputs").get("token_text")
    if texts is None or "token_text" in dataset.coords:
        return dataset
    if not all(dim in dataset.coords and np.array_equal(dataset[dim].values, texts[dim].values) for dim in texts.dims):
        return dataset
    return dataset.drop_vars("token_text", errors="ignore").assign_coords(token_text=texts)


def _component(path: str) -> str:
    return path.removeprefix("effects/")


def _main(dataset: xr.Dataset) -> str:
    return next(iter(_sited(dataset)), "") or main_variable(dataset)


def _sited(dataset: xr.Dataset) -> list[str]:
    """Variables that lie along sites, the main one first: not along steps or a vocabulary, nor a direction's vector."""
    return [
        name
        for name in drawable(dataset)
        if (array := dataset[name]).dtype.kind == "f"
        and name != "vector"
        and not {"step", "token"} & {dim for dim in array.dims if array.sizes[dim] > 1}
        and (set(array.dims) & {"layer", "sender", "position"} or "multiplier" in array.coords)
    ]


def _groups(tree: xr.DataTree, only: Iterable[str] | None) -> Iterator[tuple[str, xr.Dataset]]:
    """The groups that have a variable along sites, with their datasets."""
    chosen = None if only is None else set(only)
    for top in _GROUPS:
        for node in tree[top].subtree if top in tree.children else ():
            path = node.path.strip("/")
            if node.data_vars and (chosen is None or path in chosen) and _sited(dataset := with_tokens(tree, path)):
                yield path, dataset


def _details(tree: xr.DataTree, path: str) -> dict[str, xr.DataArray]:
    """What else lies along the cells of an effects group: receipts, and the text that a patch gave."""
    top, _, component = path.partition("/")
    if top != "effects":
        return {}
    receipts, texts = group(tree, f"receipts/{component}"), group(tree, "generations")
    named = (("changed by", "change_norm"), ("writes", "fired"))
    found = {label: receipts[name].where(receipts[name] >= 0).astype(float) for label, name in named if name in receipts}
    text = "text" if component == "patch" else f"text_{component}"
    return {**found, "text": texts[text]} if text in texts else found


def _aligned(part: xr.DataArray, dataset: xr.Dataset) -> xr.DataArray:
    """What lies along a group's cells, of the cells that the dataset has."""
    some = [dim for dim in part.dims if part.sizes[dim] > dataset.sizes.get(dim, part.sizes[dim])]
    known = [dim for dim in some if dim in part.coords and np.isin(dataset[dim].values, part[dim].values).all()]
    return part.sel({dim: dataset[dim].values for dim in known})


def _lines(tree: xr.DataTree, variable: str, x: str, parts: dict[str, xr.DataArray]) -> Figure:
    """One chart of the groups whose variable lies along one dim: the means with their intervals, then each pair."""
    first = next(iter(parts.values()))
    outer = next((dim for dim in ("pair", "prompt") if dim in first.dims), None)
    count = 0 if outer is None else first.sizes[outer]
    flat: dict[str, xr.DataArray] = {}
    for path, values in parts.items():
        single = [dim for dim in values.dims if dim not in (x, outer)]
        flat[path.partition("/")[2] or path] = values.isel(dict.fromkeys(single, 0), drop=True)

    def make(item: int | None = None) -> Lines:
        chosen = {name: values if item is None else values.isel({str(outer): item}) for name, values in flat.items()}
        series = tuple(mean_series(name, values.load(), x) for name, values in chosen.items())
        axis = axis_name(first, x)
        return Lines(series=series, x=axis, y=variable, whole=axis == "layer", **meaning_and_units(first))

    names: Sequence[str] = item_names(tree, first, str(outer))[:_MOST_PAIRS] if count > 1 else ()
    views = [View(make=make, name=f"mean over {count} {outer}s" if count > 1 else "")]
    views += [View(make=partial(make, row), name=name) for row, name in enumerate(names)]
    top = next(iter(parts)).partition("/")[0]
    title = f"{top}, {variable}" if len(flat) > 1 else f"{top}: {next(iter(flat))}, {variable}"
    return Figure(what="lines", title=title, views=tuple(views))
