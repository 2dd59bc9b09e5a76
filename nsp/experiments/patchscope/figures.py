"""Figures of a patchscope: success by source and target layer with the texts, and against its controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.experiments.patchscope.summary import success_rates
from nsp.report.default_figures import figures_by_dims, heatmap_figure
from nsp.report.figures import SHARE, Figure, Grid, Lines, Panel, Series, View, figure
from nsp.report.site_panels import labelled_grid

_CONTROLS = {"random": "random vector", "unrelated": "unrelated source", "none": "no patch"}


def figures(tree: xr.DataTree) -> list[Figure]:
    """Success rates beside their controls and every source's texts; rates by source layer; heatmaps of all else."""
    effects = list(tree["effects"].children)
    heatmaps = [one for one in figures_by_dims(tree) if one.what != "lines"]
    if not bool((tree["effects/patch"].to_dataset()["match"] >= 0).any()):
        return [figure("patchscope", "success", _unjudged, in_report=False), *heatmaps]
    shown = ["rate", *(name for name in effects if name in _CONTROLS), "none"]
    names = {name: f"control: {text}" for name, text in _CONTROLS.items()} | {"rate": "share of sources"}
    found = [view for view in heatmap_figure(tree, "effects/patch").views if view.metric == "success"]
    mean, each = (found[0], found[1:]) if found[0].item == "mean" else (None, found)
    views = [View(make=partial(_rates, tree, name, mean), name=names[name]) for name in shown]
    views += [View(make=partial(_source, view), name=view.name) for view in each]
    title = "success by source layer and target layer"
    lines = [
        View(make=partial(_lines, tree, "mean"), name="mean over target layers"),
        View(make=partial(_lines, tree, "max"), name="best target layer"),
    ]
    return [
        figure("patchscope", title, *views, abreast=len(shown) - 1),
        figure("by-layer", "success by source layer", *lines),
        *(replace(one, in_report=False) for one in heatmaps),
    ]


def _unjudged() -> Panel:
    raise InputError("no text of this run was judged: its sources have no phrases to match")


def _source(view: View) -> Grid:
    """One source's match at each source and target layer, with its texts."""
    panel = view.panel
    assert isinstance(panel, Grid)
    return replace(panel, y="source layer", x="target layer", scale=SHARE)


def _rates(tree: xr.DataTree, variable: str, mean: View | None) -> Grid:
    """The share of sources that succeed (templates averaged first), with some of their texts; or that of a control."""
    rates = success_rates(tree).transpose("layer", "target_layer")
    n, without = rates["n"].values, np.asarray(rates["none"].values, dtype=float)
    count = f"{n.max()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    main = variable == "rate"
    told: dict[str, np.ndarray] = {}
    if main:
        texts = mean.panel.details if mean is not None and isinstance(mean.panel, Grid) else {}
        told = {**texts, "over the best control": rates["lift"].values, "sources": n}
    return labelled_grid(
        rates[variable],
        y="source layer",
        x="target layer",
        scale=SHARE,
        low=rates["low"].values if main else None,
        high=rates["high"].values if main else None,
        details=told,
        meaning="share of sources with a partial or strong match",
        remark=f"n = {count} sources; without a patch {without.flat[0]:.2f}" if main and without.size else "",
    )


def _lines(tree: xr.DataTree, over: str) -> Lines:
    rates = success_rates(tree)
    reduce: Callable[..., xr.Dataset] = getattr(rates, over)
    reduced = reduce("target_layer", skipna=True)
    layers = reduced["layer"].values.astype(float)
    names = {"rate": "patched", **_CONTROLS}
    series = [
        Series(name=name, x=layers, y=np.asarray(reduced[key].values, dtype=float), aside=key == "none")
        for key, name in names.items()
        if key in reduced
    ]
    meaning = "share of sources read, partly or fully, beside the controls"
    return Lines(series=tuple(series), x="source layer", y="success", meaning=meaning, whole=True, finding="")
