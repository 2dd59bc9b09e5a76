"""What the report of a patchscope draws: success by source and target layer with the texts, and against its controls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from nsp.experiments.patchscope.results import success_rates
from nsp.report.panels import Cells, Drawing, Layer, Panel, Series, View, chart, numbers, panels_of, strongest

_CONTROLS = {"random": "control: random vector", "unrelated": "control: unrelated source", "none": "control: no patch"}


def panels(tree: xr.DataTree) -> list[Drawing]:
    """One grid with the success rate, its controls and every source's texts; rates by source layer."""
    judged = bool((tree["effects/patch"].to_dataset()["match"] >= 0).any())
    drawn = panels_of(tree, ["effects/patch"] if judged else None)
    if not judged:
        return drawn
    rates = success_rates(tree).transpose("layer", "target_layer")
    grids = [_rates(one, rates) if isinstance(one, Panel) else one for one in drawn]
    views = [
        View("mean over target layers", _lines(rates.mean("target_layer", skipna=True))),
        View("best target layer", _lines(rates.max("target_layer", skipna=True))),
    ]
    lines = chart(
        "success by source layer",
        "share of sources read, partly or fully, beside the controls",
        "1",
        "success",
        "source layer",
        views,
        finding="",
    )
    return [*grids, lines]


def _rates(panel: Panel, rates: xr.Dataset) -> Panel:
    """The panel with rates over sources (templates averaged first) in place of the mean over rows, and the controls."""
    shown = {name: [numbers(row) for row in rates[name].values] for name in ("rate", "low", "high", "lift", "n")}
    several = len(panel.layers) > 1 and panel.layers[0].name.startswith("mean")
    told: dict[str, Cells] = {"over the best control": shown["lift"], "sources": shown["n"]}
    details = {**panel.layers[0].details, **told} if several else told
    count = int(np.max(rates["n"].values))
    first = Layer(f"share of {count} sources", shown["rate"], shown["low"], shown["high"], details)
    controls = [
        Layer(name, [numbers(row) for row in rates[key].values]) for key, name in _CONTROLS.items() if key in rates
    ]
    title = "success by source layer and target layer"
    finding = strongest(title, first, panel.rows, panel.columns, "source layer", "target layer", "")
    each = panel.layers[1:] if several else panel.layers
    return replace(
        panel,
        title=title,
        y="source layer",
        x="target layer",
        reach=1.0,
        layers=[first, *controls, *each],
        finding=finding,
    )


def _lines(rates: xr.Dataset) -> list[Series]:
    layers = [float(layer) for layer in rates["layer"].values]
    names = {"rate": "patched", **{key: name.removeprefix("control: ") for key, name in _CONTROLS.items()}}
    return [Series(name, layers, numbers(rates[key].values)) for key, name in names.items() if key in rates]
