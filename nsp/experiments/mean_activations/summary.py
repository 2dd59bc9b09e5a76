"""What mean activations say of themselves: what was averaged, and how large it is."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.report.summary import Summary, SummaryTable


def summarise(tree: xr.DataTree) -> Summary:
    """What was averaged, and how large it is."""
    inputs, model = tree["inputs"].to_dataset(), tree.attrs.get("model", {})
    tokens = int(inputs["n_tokens"].sum())
    lines = (
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {inputs.sizes['prompt']} prompts, {tokens} tokens",
        "ablate with it: nsp.ablate(site, 'mean', reference='<this store>')",
    )
    rows = []
    for name, node in tree["activations"].children.items():
        group = node.to_dataset()
        size = " x ".join(f"{length} {dim}" for dim, length in group["mean"].sizes.items())
        rows.append((name, size, float(np.abs(group["mean"]).mean()), float(group["std"].mean())))
    return Summary("mean activations", lines, (SummaryTable("means", ("component", "shape", "mean |mean|", "mean std"), tuple(rows)),))
