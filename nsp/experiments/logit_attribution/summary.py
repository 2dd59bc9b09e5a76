"""What a direct logit attribution says: the largest shares of the logit."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.report.summary import Summary, SummaryTable

_SHOWN = 14


def shares(tree: xr.DataTree) -> list[tuple[str, float]]:
    """Every writer's share of the logit, mean over prompts, the largest in size first: (name, share in logits).

    Heads stand for their attention and neurons for their MLP, where the run has them.
    """
    baseline = tree["baseline"].to_dataset()
    written = [("embed", float(baseline["embed"].mean())), ("bias of norm and head", float(baseline["bias"].mean()))]
    groups = dict(tree["attribution"].children)
    for component, units in (("attn_out", "z"), ("mlp_out", "mlp_neurons")):
        name = units if units in groups else component
        mean = groups[name].to_dataset()["contribution"].mean("prompt")
        for place, value in np.ndenumerate(mean.values):
            labels = ",".join(str(int(mean[dim].values[at])) for dim, at in zip(mean.dims[1:], place[1:], strict=True))
            layer = int(mean["layer"].values[place[0]])
            written.append((f"{name}[{layer}]" + (f"[{labels}]" if labels else ""), float(value)))
    return sorted(written, key=lambda item: -abs(item[1]))


def headline(tree: xr.DataTree) -> str:
    """The largest share, in a line."""
    name, value = shares(tree)[0]
    return f"{name} adds {value:+.2f} of {float(tree['baseline']['logit'].mean()):.2f}"


def summarise(tree: xr.DataTree) -> Summary:
    """The logit, its sum, and the largest shares."""
    baseline, model = tree["baseline"].to_dataset(), tree.attrs.get("model", {})
    inputs = tree["inputs"].to_dataset()
    what = "logit difference" if bool((inputs["distractor_id"] >= 0).all()) else "logit"
    apart = float(np.abs(baseline["logit"] - baseline["total"]).max())
    lines = (
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {baseline.sizes['prompt']} prompt(s)",
        f"{what} {float(baseline['logit'].mean()):.4f}; the shares sum to {float(baseline['total'].mean()):.4f} (at most {apart:.1e} apart)",
        "a share is what a component writes directly; what later layers make of it is theirs",
    )
    rows = tuple(shares(tree)[:_SHOWN])
    return Summary(
        "direct logit attribution",
        lines,
        (SummaryTable("largest shares, mean over prompts", ("writer", "share"), rows),),
    )
