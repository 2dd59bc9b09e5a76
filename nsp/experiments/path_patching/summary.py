"""What a path-patching run says: baselines, and the strongest senders of each receiver."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from nsp.report.summary import Summary, SummaryTable
from nsp.statistics import mean_effects, sign_flip_test

_TOP = 15
_FEW = 6  # pairs below which no corrected p can reach 0.05


def summarise(tree: xr.DataTree) -> Summary:
    """Baselines, counts, and a table of the strongest paths."""
    recipe: dict[str, Any] = tree.attrs["recipe_resolved"]
    model, inputs = tree.attrs.get("model", {}), tree["inputs"].to_dataset()
    first = recipe["metric"][0]
    metric = str(first["name"] or first["kind"])
    effects, receipts = (tree[group].to_dataset() for group in ("effects/paths", "receipts/paths"))
    pairs = int(inputs.sizes["pair"])
    clean, corrupt = (float(tree["baseline"][f"{metric}_{run}"].mean()) for run in ("clean", "corrupt"))
    fired = receipts["fired"].values
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {pairs} pair(s), {recipe['mode']}, positions "
        f"{recipe['positions']}",
        f"{metric}: clean {clean:.4f}, corrupt {corrupt:.4f}" + (" (means over pairs)" if pairs > 1 else ""),
        f"{effects.sizes['sender']} senders, {effects.sizes['receiver']} receivers: {int((fired > 0).sum())} paths ran on the "
        f"{receipts.attrs.get('path', '?')} path, {int((fired == 0).sum())} are exactly zero by construction",
    ]
    left_out = list(inputs.attrs.get("left_out_items", []))
    if left_out:
        lines.append(f"{len(left_out)} item(s) of the set failed the token checks and were left out, such as {left_out[0]}")
    significant = None
    if pairs == 1:
        lines.append("one pair gives effects and no significance")
    elif pairs < _FEW:
        lines.append(f"{pairs} pairs give intervals; no corrected test can be significant with fewer than {_FEW}")
    else:
        tested = sign_flip_test(effects["effect"], seed=recipe["seed"])
        significant = tested["significant"]
        lines.append(f"{int(significant.sum())} of {int(tested['tested'].sum())} paths are significant (sign flips, max-T, 0.05)")
    return Summary(f"path patching, {recipe['mode']}", tuple(lines), (_table(effects, metric, significant, recipe["seed"]),))


def _table(effects: xr.Dataset, metric: str, significant: xr.DataArray | None, seed: int) -> SummaryTable:
    """The strongest paths of all receivers."""
    interval = mean_effects(effects["effect"], seed=seed)
    mean, raw = interval["mean"].values, effects[metric].mean("pair", skipna=True).values
    order = np.argsort(-np.abs(np.nan_to_num(mean)), axis=None, kind="stable")[:_TOP]
    at = tuple(axis[np.nan_to_num(mean).flat[order] != 0] for axis in np.unravel_index(order, mean.shape))
    ends = zip(interval["low"].values[at], interval["high"].values[at], strict=True)
    columns: dict[str, Iterable[Any]] = {
        "sender": effects["sender"].values[at[0]],
        "receiver": effects["receiver"].values[at[1]],
        "effect": mean[at],
        "interval": ["" if np.isnan(low) else f"[{low:.4f}, {high:.4f}]" for low, high in ends],
        metric: raw[at],
    }
    if significant is not None:
        columns["significant"] = ["yes" if flag else "" for flag in significant.values[at]]
    return SummaryTable.of("strongest direct paths", columns)
