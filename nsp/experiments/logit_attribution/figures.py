"""Figures of a direct logit attribution: the largest shares, shares by layer, and heads or neurons."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from nsp.experiments.logit_attribution.summary import shares
from nsp.report.default_figures import figures_by_dims
from nsp.report.figures import Bars, Figure, Scatter, Series, View, figure
from nsp.report.series import units_by_layer

_SHOWN = 20


def figures(tree: xr.DataTree) -> list[Figure]:
    """Bars of the writers with the largest shares of the logit, then every group of the run, and single neurons."""
    count = tree["inputs"].sizes["prompt"]
    over = f"mean over {count} prompts" if count > 1 else ""
    found = [figure("shares", "largest shares of the logit", View(make=partial(_shares, tree), name=over))]
    found += figures_by_dims(tree, [f"attribution/{one}" for one in tree["attribution"].children if one != "mlp_neurons"])
    if "mlp_neurons" in tree["attribution"].children:
        found.append(figure("neurons", "shares of single neurons", View(make=partial(_neurons, tree), name=over)))
    return found


def _shares(tree: xr.DataTree) -> Bars:
    best = shares(tree)[:_SHOWN]
    series = Series(name="share", x=np.arange(len(best), dtype=float), y=np.array([value for _, value in best], dtype=float))
    meaning = "what was written directly into the logit"
    return Bars(series=(series,), ticks=tuple(name for name, _ in best), x="writer", y="share", meaning=meaning, units="logit")


def _neurons(tree: xr.DataTree) -> Scatter:
    values = tree["attribution/mlp_neurons"].to_dataset()["contribution"].mean("prompt").load()
    series = units_by_layer(values, "neuron")
    meaning = "what each neuron wrote into the logit, the largest"
    return Scatter(series=(series,), x="layer", y="share", meaning=meaning, units="logit", whole=True)
