"""Figures of results besides the heatmap: bars by layer, estimates against exact effects, curves over circuit size.

Colours are Okabe and Ito's, which people with the common forms of colour blindness can tell apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nsp.errors import InputError
from nsp.recipe_errors import suggestion
from nsp.report.figures import meaning
from nsp.statistics import mean_effects

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MAIN = ("effect", "change", "indirect_effect")


def layer_bars(dataset: xr.Dataset, metric: str | None = None, *, title: str = "") -> Figure:
    """The strongest site of each layer: its mean over pairs, with a 95 % bootstrap interval where there are several.

    Args:
        dataset: a component's effects, with the dim layer and some of (pair | prompt, position, head | neuron).

    Raises:
        InputError: there are no layers, or several prompts whose positions have nothing in common.
    """
    metric = metric or main_variable(dataset)
    values = _variable(dataset, metric)
    if "layer" not in values.dims:
        raise InputError(
            f"{metric} has no layers to draw bars of; it has {', '.join(map(str, values.dims)) or 'no dims'}"
        )
    outer = next((dim for dim in ("pair", "prompt") if dim in values.dims), None)
    if outer == "prompt" and values.sizes["prompt"] > 1 and values.sizes.get("position", 1) > 1:
        raise InputError("a mean over prompts by position has no meaning: their tokens differ; draw a heatmap")
    count = values.sizes[outer] if outer else 1
    sites = values.rename({outer: "pair"}) if outer == "prompt" else values
    sites = sites if outer else sites.expand_dims("pair")
    found = mean_effects(sites)
    names, layers = ("mean", "low", "high"), values["layer"].values
    table = {name: found[name].transpose("layer", ...).values.reshape(len(layers), -1) for name in names}
    best = np.nan_to_num(np.abs(table["mean"]), nan=-1.0).argmax(axis=1)
    mean, low, high = (table[name][np.arange(len(best)), best] for name in names)
    figure, axes = _axes(max(5.0, 0.22 * len(layers) + 2), 3.6)
    there = np.isfinite(mean)
    spans = np.nan_to_num(np.vstack([mean - low, high - mean]))
    axes.bar(np.flatnonzero(there), mean[there], color=_COLOURS[0], width=0.8)
    if count > 1:
        style: Any = {"fmt": "none", "ecolor": "0.2", "elinewidth": 1, "capsize": 2}
        axes.errorbar(np.flatnonzero(there), mean[there], yerr=spans[:, there], **style)
    for place in np.flatnonzero(~there):
        axes.axvspan(place - 0.5, place + 0.5, facecolor="0.85", edgecolor="0.6", hatch="////", lw=0)
    step = max(1, len(layers) // 30)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.axhline(0, color="0.2", lw=0.8)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel(meaning(values, metric), fontsize=8, wrap=True)
    said = f"mean of {count} {outer}s, 95 % interval" if count > 1 else f"one {outer or 'value'}, no interval"
    kind = "the strongest site of each layer" if table["mean"].shape[1] > 1 else "each layer"
    remarks = [f"{kind}, {said}"] + ([] if there.all() else ["hatched: no value"])
    _title(axes, title, ", ".join(remarks))
    return figure


def effect_scatter(effects: xr.Dataset, scores: xr.Dataset, method: str | None = None, *, title: str = "") -> Figure:
    """Exact effects against a method's estimates, a point a site and prompt, with the line on which they are equal.

    Args:
        effects, scores: one component's groups ``effects`` and ``attribution``, of the same dims.
        method: a variable of `scores`; by default the first that has the effects' dims.
    """
    exact = _variable(effects, main_variable(effects))
    fits = [str(name) for name, array in scores.data_vars.items() if set(array.dims) == set(exact.dims)]
    method = method or next(iter(fits), "")
    if method not in fits:
        raise InputError(f"there is no estimate {method!r}{suggestion(method, fits)} ({', '.join(fits) or 'none'})")
    estimate, truth = (
        part.values.ravel() for part in xr.align(scores[method].transpose(*exact.dims), exact, join="exact")
    )
    there = np.isfinite(estimate) & np.isfinite(truth)
    if not there.any():
        raise InputError(f"no site has both an exact effect and an estimate by {method}")
    figure, axes = _axes(5.2, 4.8)
    both = np.concatenate([estimate[there], truth[there]])
    low, high = float(both.min()), float(both.max())
    axes.plot([low, high], [low, high], color="0.4", lw=1, ls="--", label="equal")
    axes.scatter(estimate[there], truth[there], s=6, alpha=0.5, lw=0, color=_COLOURS[0], rasterized=True)
    axes.set_xlabel(f"{method}: {meaning(scores[method], method)}", fontsize=8, wrap=True)
    axes.set_ylabel(f"exact: {meaning(exact, str(exact.name))}", fontsize=8, wrap=True)
    axes.legend(fontsize=8, frameon=False)
    left = int((~there).sum())
    _title(axes, title, f"n = {int(there.sum())} sites" + (f", {left} without a value left out" if left else ""))
    return figure


def faithfulness_curves(curves: xr.Dataset, prompts: int = 1, *, title: str = "") -> Figure:
    """Faithfulness by circuit size, a curve a method; random circuits, where the run has them, in grey.

    Args:
        curves: what `nsp.experiments.attribution.summary.curves` gives: ``faithfulness`` (component, step) with the
            coordinate ``proportion`` (step).
        prompts: how many prompts the curves stand for.
    """
    figure, axes = _axes(6.0, 4.2)
    sizes, markers = curves["proportion"].values, "osD^vPX"
    for index, name in enumerate(curves["component"].values):
        colour = "0.6" if name == "random" else _COLOURS[index % len(_COLOURS)]
        style: Any = {"color": colour, "marker": markers[index % len(markers)], "ms": 4, "lw": 1.3}
        axes.plot(sizes, curves["faithfulness"].values[index], label=str(name), **style)
    axes.axhline(1, color="0.4", lw=0.8, ls="--")
    axes.axhline(0, color="0.4", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("proportion of all units in the circuit", fontsize=9)
    axes.set_ylabel("faithfulness (0: empty circuit, 1: whole model)", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    said = "one prompt" if prompts == 1 else f"the metric's mean over {prompts} prompts"
    _title(axes, title, said)
    return figure


def main_variable(dataset: xr.Dataset) -> str:
    """The variable that says what a component does: its effect, else the first number that has sites."""
    fits = [str(name) for name, array in dataset.data_vars.items() if array.dtype.kind == "f" and array.ndim]
    if not fits:
        raise InputError("there are no numbers to draw here")
    return next((name for name in _MAIN if name in fits), fits[0])


def _variable(dataset: xr.Dataset, metric: str) -> xr.DataArray:
    known = [str(name) for name, array in dataset.data_vars.items() if array.dtype.kind == "f"]
    if metric not in known:
        raise InputError(f"there is no metric {metric!r} to draw{suggestion(metric, known)} ({', '.join(known)})")
    return dataset[metric].load()


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _title(axes: Any, title: str, remark: str) -> None:
    axes.set_title("\n".join(part for part in (title, remark) if part), fontsize=9, loc="left", parse_math=False)
