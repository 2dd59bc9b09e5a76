"""Figures of an alignment scan: precision and recall of neurons on held-out prompts, and where they are."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from nsp.experiments.alignment_scan.select import AlignmentNeurons, Firing, alignment_neurons
from nsp.report.figures import Bars, Figure, Scatter, Series, View, figure


def figures(tree: xr.DataTree) -> list[Figure]:
    """Precision against recall of every neuron that fires, and the selected ones by layer."""
    return neuron_figures(alignment_neurons(tree))


def neuron_figures(neurons: AlignmentNeurons) -> list[Figure]:
    """The figures of neurons that a scan selected, on the held-out and on the searched prompts."""
    halves = {"held-out prompts": neurons.held, "searched prompts": neurons.searched}
    views = [View(make=partial(_precision, neurons, half), name=name) for name, half in halves.items()]
    found = [figure("neurons", "precision and recall of neurons", *views)]
    return found + ([figure("layers", "selected neurons by layer", partial(_layers, neurons))] if neurons.selected.any() else [])


def _groups(neurons: AlignmentNeurons) -> dict[str, np.ndarray]:
    return {"confirmed": neurons.confirmed, "selected, not confirmed": neurons.selected & ~neurons.confirmed}


def _precision(neurons: AlignmentNeurons, half: Firing) -> Scatter:
    fires = neurons.searched.harmful + neurons.searched.normal > 0
    series = []
    for group, flags in {**_groups(neurons), "not selected": ~neurons.selected & fires}.items():
        there = np.flatnonzero(flags)
        notes = tuple(f"layer {neurons.layer[at]}, neuron {neurons.neuron[at]}, q {neurons.q[at]:.2g}" for at in there)
        if len(there):
            series.append(Series(name=group, x=half.recall[there], y=half.precision[there], notes=notes))
    selected, confirmed = int(neurons.selected.sum()), int(neurons.confirmed.sum())
    fired = "neurons that fire on harmful prompts"
    return Scatter(
        series=tuple(series),
        x="recall",
        y="precision",
        meaning="share of the prompts it fires on that are harmful, against the share of harmful prompts it fires on",
        x_told=True,
        finding=f"{fired}: {selected} selected, {confirmed} of them confirmed on held-out prompts",
    )


def _layers(neurons: AlignmentNeurons) -> Bars:
    layers = sorted(set(neurons.layer.tolist()))
    x = np.arange(len(layers), dtype=float)
    series = [
        Series(name=group, x=x, y=np.array([float((flags & (neurons.layer == layer)).sum()) for layer in layers]))
        for group, flags in _groups(neurons).items()
    ]
    meaning = "how many neurons of each layer were selected"
    return Bars(
        series=tuple(series), ticks=tuple(map(str, layers)), x="layer", y="neurons", meaning=meaning, units="neurons", finding=""
    )
