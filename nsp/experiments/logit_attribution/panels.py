"""What the report of a direct logit attribution draws: the largest shares, shares by layer, and heads or neurons."""

from __future__ import annotations

import xarray as xr

from nsp.experiments.logit_attribution.summary import shares
from nsp.report.panels import Drawing, Series, View, by_layer, chart, numbers, panels_of

_SHOWN = 20


def panels(tree: xr.DataTree) -> list[Drawing]:
    """Bars of the writers with the largest shares, then every group of the run."""
    best = shares(tree)[:_SHOWN]
    count = tree["inputs"].sizes["prompt"]
    name = f"mean over {count} prompts" if count > 1 else ""
    bars = Series(
        "share",
        [float(at) for at in range(len(best))],
        numbers([value for _, value in best]),
        labels=[one for one, _ in best],
        form="bars",
    )
    meaning, ticks = "what was written directly into the logit", [one for one, _ in best]
    drawn: list[Drawing] = [
        chart("largest shares of the logit", meaning, "logit", "share", "writer", [View(name, [bars])], ticks=ticks)
    ]
    groups = [f"attribution/{one}" for one in tree["attribution"].children if one != "mlp_neurons"]
    drawn += panels_of(tree, groups)
    if "mlp_neurons" in tree["attribution"].children:
        values = tree["attribution/mlp_neurons"].to_dataset()["contribution"].mean("prompt").load()
        view = View(name, [by_layer("neuron", values, "neuron")])
        drawn.append(
            chart(
                "shares of single neurons",
                "what each neuron wrote into the logit, the largest",
                "logit",
                "share",
                "layer",
                [view],
            )
        )
    return drawn
