"""What a causal-tracing run says: effects by what a token is to the fact, as in Meng et al. 2022, figures 1 and 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.facts import ROLES
from nsp.report.summary import Summary, SummaryTable
from nsp.statistics import mean_effects


def by_role(tree: xr.DataTree, component: str, variable: str = "indirect_effect", *, seed: int = 0) -> xr.Dataset:
    """Effects of one component averaged over facts, by layer and by what a token is to the fact.

    A fact's effect at a role is its mean over the tokens of that role; facts that have no such token are left out of
    that role. Returns ``mean``, ``low``, ``high`` (a bootstrap interval of 95% over facts) and ``n`` (facts) with dims
    (position, layer); ``position`` holds the roles, in the order of a prompt.
    """
    effects = tree[f"effects/{component}"].to_dataset()
    return mean_effects(_role_means(tree, effects[variable]), seed=seed)


def _role_means(tree: xr.DataTree, values: xr.DataArray) -> xr.DataArray:
    """(prompt, layer, position) as (pair, position, layer) with roles for positions: means over each role's tokens."""
    role = np.asarray(tree["inputs"].to_dataset()["role"].values)
    place = np.asarray(values["token_position"].values)  # (prompt, position), -1: none
    of_cell = np.where(place >= 0, np.take_along_axis(role, np.maximum(place, 0), axis=1), "")
    data = values.transpose("prompt", "layer", "position").values.astype(np.float64)
    parts = []
    for name in ROLES:
        chosen = (of_cell == name)[:, None, :] & ~np.isnan(data)
        count = chosen.sum(axis=2)
        total = np.where(chosen, data, 0).sum(axis=2)
        parts.append(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))
    coords = {"pair": values["prompt"].values, "position": list(ROLES), "layer": values["layer"].values}
    return xr.DataArray(np.stack(parts, axis=1), dims=("pair", "position", "layer"), coords=coords, attrs=values.attrs)


def total_effect(tree: xr.DataTree, metric: str, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean over facts of clean - corrupted, with the ends of its bootstrap interval of 95%."""
    baseline = tree["baseline"].to_dataset()
    values = baseline[f"{metric}_clean"] - baseline[f"{metric}_corrupted"]
    effect = mean_effects(values.astype(np.float64).rename(prompt="pair"), seed=seed)
    return float(effect["mean"]), float(effect["low"]), float(effect["high"])


def summarise(tree: xr.DataTree) -> Summary:
    """Total effect, and for each component the layer at which each role's mean indirect effect is largest."""
    recipe: dict[str, Any] = tree.attrs["recipe_resolved"]
    model, inputs = tree.attrs.get("model", {}), tree["inputs"].to_dataset()
    metric = _metric(recipe)
    facts = int(inputs.sizes["prompt"])
    seeds = inputs.attrs.get("noise_seeds", [[]])
    baseline = tree["baseline"].to_dataset()
    clean, corrupted = (float(baseline[f"{metric}_{run}"].mean()) for run in ("clean", "corrupted"))
    mean, low, high = total_effect(tree, metric)
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {facts} fact(s), {len(seeds[0])} draw(s) of noise of "
        f"{float(inputs.attrs.get('noise_scale', np.nan)):.3g} standard deviations of the embedding",
        f"{metric}: clean {clean:.4f}, corrupted {corrupted:.4f}; total effect {mean:.4f} {_interval(low, high)} (means over facts)",
    ]
    left_out = list(inputs.attrs.get("left_out", []))
    if left_out:
        lines.append(f"{len(left_out)} fact(s) the model does not know were left out, such as {left_out[0]!r}")
    tables = []
    for component, node in tree["effects"].children.items():
        window = int(node.attrs.get("window", 1))
        receipts = tree[f"receipts/{component}"].to_dataset()
        fired = receipts["fired"].values
        lines.append(
            f"{component}: {int((fired > 0).sum())} states restored on the {receipts.attrs.get('path', '?')} path, "
            f"{int((fired == 0).sum())} are exactly zero by construction"
        )
        tables.append(_role_table(tree, component, window, recipe.get("seed", 0)))
    if facts == 1:
        lines.append("one fact gives effects and no intervals")
    return Summary("causal tracing", tuple(lines), tuple(tables))


def _role_table(tree: xr.DataTree, component: str, window: int, seed: int) -> SummaryTable:
    effects = by_role(tree, component, seed=seed)
    rows = []
    for name, words in ROLES.items():
        of_role = effects.sel(position=name)
        if of_role["mean"].isnull().all():
            continue
        best = of_role.isel(layer=int(np.nanargmax(of_role["mean"].values)))
        interval = _interval(float(best["low"]), float(best["high"]))
        rows.append((words, int(best["layer"]), float(best["mean"]), interval, int(best["n"])))
    what = f"windows of {window} layers of {component}" if window > 1 else f"single states of {component}"
    title = f"{what}: largest mean indirect effect by token (bootstrap over facts, 95%, not corrected for the choice of layer)"
    return SummaryTable(title, ("token", "layer", "indirect effect", "interval", "facts"), tuple(rows))


def _interval(low: float, high: float) -> str:
    return "" if np.isnan(low) else f"[{low:.4f}, {high:.4f}]"


def _metric(recipe: dict[str, Any]) -> str:
    """The name of the first metric."""
    first = recipe["metric"][0]
    return str(first["name"] or first["kind"])


