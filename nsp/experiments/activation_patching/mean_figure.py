"""The one figure of an activation-patching run: a component's mean over pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def patching_figure(tree: xr.DataTree, variable: str = "effect", component: str | None = None) -> Figure:
    """One variable of one component (by default the first) as a heatmap: the mean over pairs."""
    from nsp.experiments.run_figures import picture_of
    from nsp.report.drawing import draw

    name = component or next(iter(tree["effects"].children))
    pairs = tree[f"effects/{name}"].sizes["pair"] if name in tree["effects"].children else 1
    title = f"{name}: {variable}" + (f", mean over {pairs} pairs" if pairs > 1 else "")
    drawn: Figure = draw(picture_of(tree, "heatmap", name, variable, "mean", title=title))
    return drawn
