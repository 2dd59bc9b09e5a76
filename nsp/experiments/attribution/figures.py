"""Figures of attribution: scores against exact effects, curves of circuits, units by layer, and edges."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import xarray as xr

from nsp.experiments.attribution.recipe import NODE_METHODS
from nsp.experiments.attribution.summary import agreement, curves
from nsp.report.default_figures import figures_by_dims, heatmap_figure
from nsp.report.figures import Figure, Lines, Panel, Scatter, Series, View, figure
from nsp.report.labels import meaning_and_units
from nsp.report.series import units_by_layer
from nsp.report.site_panels import effect_scatter

_EDGES = 25  # senders and receivers in the matrix of edges


def figures(tree: xr.DataTree) -> list[Figure]:
    """Every figure that the run has data for."""
    components = [str(name) for name in tree["attribution"].children if name != "edges"]
    exact = list(tree["effects"].children) if "effects" in tree.children else []
    found = [one for name in components if name in exact for one in _scatter(tree, name)]
    found += _curves(tree)
    for name in components:
        found += _units(tree, name)
    if "edges" in tree["attribution"].children:
        found += _edges(tree)
    # Of exact effects a report has the scatter: most units have none.
    return found + [replace(one, in_report=False) for one in figures_by_dims(tree, [f"effects/{name}" for name in exact])]


def _methods(dataset: xr.Dataset) -> list[str]:
    return [str(name) for name in dataset.data_vars if name in NODE_METHODS]


def _scatter(tree: xr.DataTree, name: str) -> list[Figure]:
    scores = tree[f"attribution/{name}"].to_dataset()
    views = [View(make=partial(_against_exact, tree, name, one), name=one, component=name, metric=one) for one in _methods(scores)]
    return [figure("scatter", f"{name}: estimates and exact effects", *views)] if views else []


def _against_exact(tree: xr.DataTree, name: str, method: str) -> Scatter:
    """One method's estimates against the exact effects, with how alike they rank the units."""
    panel = effect_scatter(tree[f"effects/{name}"].to_dataset(), tree[f"attribution/{name}"].to_dataset(), method)
    spearman = agreement(tree, name)["spearman"].mean("prompt")
    ranks = dict(zip(map(str, spearman["component"].values), spearman.values.tolist(), strict=True))
    best = max(ranks, key=lambda one: np.nan_to_num(ranks[one], nan=-2.0))
    said = f"{name}: {best} ranks units nearest to their exact effects, Spearman {ranks[best]:.3f} (mean over prompts)"
    return replace(panel, remark=f"Spearman {ranks[method]:.3f} (mean over prompts), {panel.remark}", finding=said)


def _curves(tree: xr.DataTree) -> list[Figure]:
    names = [str(name) for name in tree["circuit"].children] if "circuit" in tree.children else []
    ablations = [name.removeprefix("curves-") for name in names if name.startswith("curves-")]
    found = []
    for measure in ("faithfulness", "completeness"):
        views = [
            View(make=partial(_curve, tree, one, measure), name=f"all else {'at ' if one != 'resample' else ''}{one}", component=one)
            for one in ablations
        ]
        found += [figure(measure, f"{measure} by circuit size", *views)] if views else []
    return found


def _curve(tree: xr.DataTree, ablation: str, measure: str) -> Lines:
    """One measure by circuit size, a line for each method; random circuits, where the run has them, aside."""
    measured = curves(tree, ablation)
    stored = tree[f"circuit/curves-{ablation}"].to_dataset()
    prompts = stored.sizes.get("prompt", 1)
    proportions = np.asarray(measured["proportion"].values, dtype=np.float64)
    notes = tuple(f"{int(size)} units" for size in measured["size"].values)
    rows = {str(name): np.asarray(measured[measure].sel(component=name).values, dtype=float) for name in measured["component"].values}
    finding = ""
    if measure == "faithfulness" and np.isfinite(measured["cpr"].values).any():
        best = measured["component"].values[int(np.nanargmax(measured["cpr"].values))]
        area = float(measured["cpr"].sel(component=best))
        finding = f"circuits ({ablation} ablation): {best} has the largest area under its faithfulness curve, {area:.3f}"
    averaged = "one prompt" if prompts == 1 else f"the metric's mean over {prompts} prompts"
    whole = {"faithfulness": "faithfulness (0: empty circuit, 1: whole model)", "completeness": "what is left without the circuit"}
    return Lines(
        series=tuple(
            Series(name=name, x=proportions, y=row, notes=notes, aside=name == "random")
            for name, row in rows.items()
            if np.isfinite(row).any()
        ),
        remark=f"{averaged}; {ablation} ablation; {int(stored.attrs['universe'])} units in all",
        x="proportion of all units in the circuit",
        y=measure,
        meaning=whole[measure],
        levels=(0.0, 1.0),
        log_x=True,
        finding=finding,
    )


def _units(tree: xr.DataTree, name: str) -> list[Figure]:
    """The units of each layer with the largest scores, mean over prompts."""
    scores = tree[f"attribution/{name}"].to_dataset()
    views = []
    for method in _methods(scores):
        unit = next((dim for dim in ("neuron", "head") if scores[method].sizes.get(dim, 0) > 1), None)
        if unit is not None and "layer" in scores[method].dims:
            views.append(View(make=partial(_largest, scores, method, unit), name=method, component=name, metric=method))
    return [figure("units", f"{name}: units with the largest scores", *views)] if views else []


def _largest(scores: xr.Dataset, method: str, unit: str) -> Panel:
    mean = scores[method].load().mean("prompt", skipna=True)
    for dim in [str(dim) for dim in mean.dims if dim not in ("layer", unit)]:
        mean = mean.isel({dim: abs(mean).fillna(-1.0).argmax(dim)})
    count = scores.sizes.get("prompt", 1)
    return Scatter(
        series=(units_by_layer(mean, unit),),
        x="layer",
        y="estimate",
        meaning="estimated change of the metric" + (f", mean over {count} prompts" if count > 1 else ""),
        units=meaning_and_units(scores[method])["units"],
        whole=True,
    )


def _edges(tree: xr.DataTree) -> list[Figure]:
    """The strongest senders against the strongest receivers."""
    dataset = tree["attribution/edges"].to_dataset()
    size = np.nan_to_num(np.abs(dataset["edge"].load().mean("prompt", skipna=True).transpose("sender", "receiver").values))
    ends = {dim: np.sort(np.argsort(-size.max(axis=axis), kind="stable")[:_EDGES]) for axis, dim in ((1, "sender"), (0, "receiver"))}
    title = "edges between the strongest senders and receivers"
    return [heatmap_figure(tree, "attribution/edges", dataset.isel(ends), title=title)]
