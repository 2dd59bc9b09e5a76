"""What the report of a path-patching run draws: the strongest senders against all receivers, and senders by layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from nsp.report.panels import Drawing, Layer, Panel, grid_panel, numbers, panel
from nsp.statistics import mean_effects

_SENDERS = 30


def panels(tree: xr.DataTree) -> list[Drawing]:
    """A matrix of sender against receiver, and for each receiver its senders by layer and head."""
    dataset = tree["effects/paths"].to_dataset().load()
    effect = dataset["effect"]
    mean = effect.mean("pair", skipna=True).transpose("sender", "receiver")
    size = np.nan_to_num(np.abs(mean.values), nan=-1.0).max(axis=1)
    order = np.argsort(-size, kind="stable")[:_SENDERS][::-1]
    kept = dataset.isel(sender=np.sort(order) if len(size) <= _SENDERS else order)
    title = "paths, sender against receiver"
    matrix = grid_panel(tree, "effects/paths", kept, kept["effect"], title=title)
    drawn: list[Drawing] = []
    if matrix is not None:
        drawn.append(_told(tree, matrix, kept, effect.sizes["sender"]))
    grid = _by_layer(effect)
    return [*drawn, grid] if grid is not None else drawn


def _told(tree: xr.DataTree, matrix: Panel, kept: xr.Dataset, senders: int) -> Panel:
    """The matrix with the receipts of the senders that it has."""
    receipts = tree["receipts/paths"].to_dataset().sel(sender=kept["sender"]).load()
    parts = {
        name: receipts[variable].where(receipts["fired"] >= 0).transpose("pair", "sender", "receiver")
        for name, variable in (("changed by", "change_norm"), ("writes", "fired"))
    }
    layers = []
    several = len(matrix.layers) > 1
    for place, layer in enumerate(matrix.layers):
        mean = several and place == 0
        shown = {name: part.mean("pair") if mean else part.isel(pair=place - several) for name, part in parts.items()}
        details = {
            f"{name}, mean" if mean else name: [numbers(row) for row in part.values] for name, part in shown.items()
        }
        layers.append(
            Layer(layer.name, layer.values, layer.low, layer.high, {**layer.details, **details}, layer.columns)
        )
    note = (
        f"the {len(matrix.rows)} strongest of {senders} senders, strongest on top"
        if senders > len(matrix.rows)
        else matrix.note
    )
    return replace(matrix, layers=layers, note=note)


def _by_layer(effect: xr.DataArray) -> Panel | None:
    """For each receiver the mean effect of every sender, layer against head; whole components stand in columns of their own."""
    if not {"sender_layer", "sender_head"} <= set(effect.coords) or effect.sizes["sender"] < 2:
        return None
    depth, heads = effect["sender_layer"].values.astype(int), effect["sender_head"].values.astype(int)
    whole = [str(name).partition("[")[0] for name in effect["sender"].values]
    columns = [str(head) for head in sorted(set(heads[heads >= 0].tolist()))]
    columns += sorted({name for name, head in zip(whole, heads, strict=True) if head < 0})
    rows = [str(layer) for layer in sorted(set(depth[depth >= 0].tolist()))]
    if len(rows) < 2 or len(columns) < 2:
        return None
    found = mean_effects(effect, resamples=500)
    layers = []
    size = found["mean"].transpose("receiver", "sender").values
    for receiver in np.argsort(-np.nan_to_num(np.abs(size), nan=-1.0).max(axis=1), kind="stable"):
        grids = {name: np.full((len(rows), len(columns)), np.nan) for name in ("mean", "low", "high")}
        for sender in range(effect.sizes["sender"]):
            if depth[sender] < 0:
                continue
            column = columns.index(str(heads[sender]) if heads[sender] >= 0 else whole[sender])
            for name, grid in grids.items():
                grid[rows.index(str(depth[sender])), column] = found[name].isel(receiver=int(receiver)).values[sender]
        shown = {name: [numbers(row) for row in grid] for name, grid in grids.items()}
        layers.append(Layer(f"to {effect['receiver'].values[receiver]}", shown["mean"], shown["low"], shown["high"]))
    count = effect.sizes["pair"]
    return panel(
        "senders by layer and head", str(effect.attrs.get("long_name", "effect")), "1", ("layer", "head"), rows, columns, layers,
        variable="effect", note=f"mean over {count} pairs" if count > 1 else "",
    )  # fmt: skip
