"""Figures of path patching: the strongest senders against all receivers, and senders by layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import xarray as xr

from nsp.report.default_figures import heatmap_figure
from nsp.report.figures import Edge, Figure, Graph, Grid, Node, Panel, View, diverging, figure
from nsp.report.labels import meaning_and_units
from nsp.statistics import mean_effects

_SENDERS = 30
_EDGES = 60


def figures(tree: xr.DataTree) -> list[Figure]:
    """A matrix of sender against receiver, for each receiver its senders by layer and head, and both as a graph."""
    dataset = tree["effects/paths"].to_dataset()
    effect = dataset["effect"].load()
    size = np.nan_to_num(np.abs(effect.mean("pair", skipna=True).transpose("sender", "receiver").values), nan=-1.0)
    strongest = np.argsort(-size.max(axis=1), kind="stable")[:_SENDERS][::-1]
    senders, some = len(size), len(size) > _SENDERS
    kept = dataset.isel(sender=strongest if some else np.sort(strongest))
    matrix = heatmap_figure(tree, "effects/paths", kept, title="paths, sender against receiver")
    if some:
        note = f"the {_SENDERS} strongest of {senders} senders, strongest on top"
        matrix = replace(matrix, views=tuple(replace(one, make=partial(_noted, one, note)) for one in matrix.views))
    order = np.argsort(-size.max(axis=0), kind="stable")
    columns, rows = _columns(effect), sorted({int(depth) for depth in _depth(effect) if depth >= 0})
    found = [matrix]
    if len(rows) > 1 and len(columns) > 1:
        views = [
            View(make=partial(_by_layer, effect, int(at), columns, rows), name=f"to {effect['receiver'].values[at]}") for at in order
        ]
        found.append(figure("senders", "senders by layer and head", *views))
    if len(rows):
        found.append(figure("graph", "paths as a graph", partial(_graph, effect, strongest)))
    return found


def _noted(view: View, note: str, **options: object) -> Panel:
    panel = view.make(**options)
    return replace(panel, remark=", ".join(part for part in (panel.remark, note) if part))


def _depth(effect: xr.DataArray) -> np.ndarray:
    return np.asarray(effect["sender_layer"].values if "sender_layer" in effect.coords else [-1] * effect.sizes["sender"], dtype=int)


def _column(effect: xr.DataArray) -> list[str]:
    """The column of each sender: its head, or the component as a whole."""
    if "sender_head" not in effect.coords:
        return []
    heads, names = effect["sender_head"].values.astype(int), effect["sender"].values
    return [str(head) if head >= 0 else str(name).partition("[")[0] for head, name in zip(heads, names, strict=True)]


def _columns(effect: xr.DataArray) -> list[str]:
    """Heads in their order, then whole components."""
    return sorted(set(_column(effect)), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))


def _by_layer(effect: xr.DataArray, receiver: int, columns: list[str], rows: list[int]) -> Grid:
    """The mean effect of every sender on one receiver, layer against head; whole components have columns of their own."""
    means = mean_effects(effect.isel(receiver=receiver), resamples=500)
    grids = {name: np.full((len(rows), len(columns)), np.nan) for name in ("mean", "low", "high")}
    for sender, (depth, column) in enumerate(zip(_depth(effect), _column(effect), strict=True)):
        for name, grid in grids.items() if depth >= 0 else ():
            grid[rows.index(int(depth)), columns.index(column)] = means[name].values[sender]
    count = effect.sizes["pair"]
    return Grid(
        values=grids["mean"],
        low=grids["low"],
        high=grids["high"],
        rows=tuple(map(str, rows)),
        columns=tuple(columns),
        y="layer",
        x="head",
        scale=diverging(grids["mean"]),
        remark=f"mean over {count} pairs" if count > 1 else "",
        **meaning_and_units(effect),
    )


def _graph(effect: xr.DataArray, strongest: np.ndarray) -> Graph:
    """The strongest senders and the receivers, each at its layer, with the mean effects as edges."""
    means = effect.isel(sender=strongest).mean("pair", skipna=True).transpose("sender", "receiver")
    depth, columns = _depth(effect)[strongest], _columns(effect)
    places = [columns.index(name) for name in _column(effect)]
    names = [str(name) for name in means["sender"].values]
    nodes = [
        Node(name, float(layer), float(places[at]), note=f"sender in layer {layer}")
        for name, layer, at in zip(names, depth, strongest, strict=True)
    ]
    end = float(max(depth, default=0) + 2)
    receivers = [str(name) for name in means["receiver"].values]
    nodes += [Node(f"to {name}", end, float(at), note="receiver") for at, name in enumerate(receivers)]
    size = np.nan_to_num(np.abs(means.values)).reshape(-1)
    edges = [
        Edge(names[at // len(receivers)], f"to {receivers[at % len(receivers)]}", float(means.values.flat[at]))
        for at in np.argsort(-size, kind="stable")[:_EDGES]
        if size[at] > 0
    ]
    remark = f"the {len(edges)} strongest of {int((size > 0).sum())} paths"
    return Graph(
        nodes=tuple(nodes), edges=tuple(edges), x="layer", y="head", remark=remark, finding="", **meaning_and_units(effect)
    )
