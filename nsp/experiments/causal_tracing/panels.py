"""What the report of causal tracing draws: mean effects by layer and by what a token is to the fact, then every fact."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.datasets.facts import ROLES
from nsp.experiments.causal_tracing.summary import by_role
from nsp.report.panels import Drawing, Layer, Panel, numbers, panel, panels_of


def panels(tree: xr.DataTree) -> list[Drawing]:
    """A heatmap of roles against layers for each component (Meng et al. 2022, figure 2), and one of each fact."""
    return [*(_roles(tree, str(name)) for name in tree["effects"].children), *panels_of(tree)]


def _roles(tree: xr.DataTree, component: str) -> Panel:
    node = tree[f"effects/{component}"]
    window = int(node.attrs.get("window", 1))
    found = by_role(tree, component)
    kept = [name for name in ROLES if np.isfinite(found["mean"].sel(position=name).values).any()]
    rows = [ROLES[name] for name in kept][::-1]  # the first words of the prompt on top
    part = found.sel(position=kept[::-1]).transpose("position", "layer")
    grids = {name: [numbers(row) for row in part[name].values] for name in ("mean", "low", "high", "n")}
    columns = [str(layer) for layer in part["layer"].values]
    facts = tree["inputs"].sizes["prompt"]
    layer = Layer(
        f"mean over {facts} facts" if facts > 1 else "", grids["mean"], grids["low"], grids["high"],
        {"facts with such a token": grids["n"]},
    )  # fmt: skip
    what = (
        f"windows of {window} layers of {component} restored"
        if window > 1
        else f"single states of {component} restored"
    )
    units = str(node.to_dataset()["indirect_effect"].attrs.get("units", "1"))
    return panel(
        f"{component}, by token and layer", f"mean indirect effect, {what}", units, ("token", "layer"), rows, columns, [layer],
        variable="indirect_effect by role",
    )  # fmt: skip
