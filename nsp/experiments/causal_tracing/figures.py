"""Figures of causal tracing: mean effects by layer and by what a token is to the fact, then every fact."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from nsp.datasets.facts import ROLES
from nsp.experiments.causal_tracing.summary import by_role
from nsp.report.default_figures import figures_by_dims
from nsp.report.figures import Figure, Grid, View, figure
from nsp.report.labels import meaning_and_units
from nsp.report.site_panels import labelled_grid


def figures(tree: xr.DataTree) -> list[Figure]:
    """A heatmap of roles against layers for each component (Meng et al. 2022, figure 2), and one of each fact."""
    facts = tree["inputs"].sizes["prompt"]
    name = f"mean over {facts} facts" if facts > 1 else ""
    roles = [
        figure("roles", f"{one}, by token and layer", View(make=partial(_roles, tree, one), name=name, component=one))
        for one in map(str, tree["effects"].children)
    ]
    return roles + figures_by_dims(tree)


def _roles(tree: xr.DataTree, component: str) -> Grid:
    window = int(tree[f"effects/{component}"].attrs.get("window", 1))
    means = by_role(tree, component)
    kept = [name for name in ROLES if np.isfinite(means["mean"].sel(position=name).values).any()][::-1]
    part = means.sel(position=kept).assign_coords(position=[ROLES[name] for name in kept]).transpose("position", "layer")
    restored = f"windows of {window} layers" if window > 1 else "single states"
    effect = tree[f"effects/{component}"].to_dataset()["indirect_effect"]
    return labelled_grid(  # the first words of the prompt are on top
        part["mean"],
        y="token",
        low=part["low"].values,
        high=part["high"].values,
        details={"facts with such a token": part["n"].values},
        meaning=f"mean indirect effect, {restored} of {component} restored",
        units=meaning_and_units(effect)["units"],
    )
