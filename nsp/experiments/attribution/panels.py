"""What the report of an attribution run draws: scores against exact effects, curves of circuits, units, and edges."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.experiments.attribution.recipe import NODE_METHODS
from nsp.experiments.attribution.summary import agreement, curves
from nsp.report.panels import Drawing, Series, View, by_layer, chart, grid_panel, numbers, spread

_EDGES = 25  # senders and receivers in the matrix of edges


def panels(tree: xr.DataTree) -> list[Drawing]:
    """Every drawing that the run has data for."""
    drawn: list[Drawing] = []
    components = [str(name) for name in tree["attribution"].children if name != "edges"]
    exact = tree["effects"].children if "effects" in tree.children else ()
    drawn += [_scatter(tree, name) for name in components if name in exact]
    drawn += _curves(tree)
    for name in components:
        drawn += _units(tree, name)
    if "edges" in tree["attribution"].children:
        drawn += _edges(tree)
    return drawn


def _scatter(tree: xr.DataTree, name: str) -> Drawing:
    scores = tree[f"attribution/{name}"].to_dataset().load()
    exact = tree[f"effects/{name}"].to_dataset()["change"].load()
    rank = agreement(tree, name)["spearman"].mean("prompt")
    known = np.flatnonzero(np.isfinite(exact.values.reshape(-1)))
    views = []
    for method in (str(one) for one in scores.data_vars if one in NODE_METHODS):
        x = scores[method].transpose(*exact.dims).values.reshape(-1)[known]
        y = exact.values.reshape(-1)[known]
        kept = spread(len(known), x, y)
        labels = [_named(exact, int(known[at])) for at in kept]
        series = Series(
            "unit", [float(value or 0) for value in numbers(x[kept])], numbers(y[kept]), labels=labels, form="points"
        )
        correlation = float(rank.sel(component=method))
        views.append(
            View(
                f"{method}: Spearman {correlation:.3f} (mean over prompts), {len(kept)} of {len(known)} units drawn",
                [series],
            )
        )
    best = max(zip(rank["component"].values, rank.values, strict=True), key=lambda one: np.nan_to_num(one[1], nan=-2.0))
    return chart(
        f"{name}: estimates and exact effects", "exact change of the metric against a method's estimate of it", str(exact.attrs.get("units", "1")),
        "exact change", "estimate", views, equality=True, tell_x=True,
        finding=f"{name}: {best[0]} ranks units nearest to their exact effects, Spearman {best[1]:.3f} (mean over prompts)",
    )  # fmt: skip


def _named(values: xr.DataArray, index: int) -> str:
    """What a unit is called: its prompt, layer and so on."""
    at = np.unravel_index(index, values.shape)
    wide = [(dim, place) for dim, place in zip(values.dims, at, strict=True) if values.sizes[dim] > 1]
    return ", ".join(f"{dim} {values[dim].values[place]}" for dim, place in wide)


def _curves(tree: xr.DataTree) -> list[Drawing]:
    names = [str(name) for name in tree["circuit"].children] if "circuit" in tree.children else []
    ablations = [name.removeprefix("curves-") for name in names if name.startswith("curves-")]
    found = {ablation: curves(tree, ablation) for ablation in ablations}
    drawn: list[Drawing] = []
    for measure, meaning in (
        ("faithfulness", "what a circuit of so many units keeps of the metric: 0 none, 1 all"),
        ("completeness", "what is left without the circuit"),
    ):
        views = []
        for ablation, one in found.items():
            sizes = [float(size) for size in one["size"].values]
            series = [
                Series(
                    str(method),
                    sizes,
                    numbers(one[measure].sel(component=method).values),
                    labels=[f"{size:.0f} units" for size in sizes],
                )
                for method in one["component"].values
                if np.isfinite(one[measure].sel(component=method).values).any()
            ]
            views.append(View(f"all else {'at ' if ablation != 'resample' else ''}{ablation}", series))
        if views:
            last = found[ablations[0]]
            best = last["component"].values[int(np.nanargmax(last["cpr"].values))]
            area = float(last["cpr"].sel(component=best))
            said = (
                f"circuits ({ablations[0]} ablation): {best} has the largest area under its faithfulness curve, {area:.3f}"
                if measure == "faithfulness"
                else ""
            )
            drawn.append(
                chart(
                    f"{measure} by circuit size",
                    meaning,
                    "1",
                    measure,
                    "units in the circuit",
                    views,
                    logarithmic=True,
                    finding=said,
                )
            )
    return drawn


def _units(tree: xr.DataTree, name: str) -> list[Drawing]:
    """The units of each layer with the largest scores, mean over prompts."""
    scores = tree[f"attribution/{name}"].to_dataset()
    views, units = [], "1"
    for method in (str(one) for one in scores.data_vars if one in NODE_METHODS):
        values = scores[method].load()
        unit = next((dim for dim in ("neuron", "head") if values.sizes.get(dim, 0) > 1), None)
        if unit is None or "layer" not in values.dims or not np.isfinite(values.values).any():
            continue
        mean = values.mean("prompt", skipna=True)
        for dim in [str(dim) for dim in mean.dims if dim not in ("layer", unit)]:
            places = abs(mean).fillna(-1.0).argmax(dim)
            mean = mean.isel({dim: places})
        views.append(View(method, [by_layer(unit, mean, unit)]))
        units = str(values.attrs.get("units", "1"))
    count = scores.sizes.get("prompt", 1)
    over = f", mean over {count} prompts" if count > 1 else ""
    made = chart(
        f"{name}: units with the largest scores",
        f"estimated change of the metric{over}",
        units,
        "estimate",
        "layer",
        views,
    )
    return [made] if made.views else []


def _edges(tree: xr.DataTree) -> list[Drawing]:
    """The strongest senders against the strongest receivers."""
    dataset = tree["attribution/edges"].to_dataset().load()
    mean = dataset["edge"].mean("prompt", skipna=True).transpose("sender", "receiver")
    size = np.nan_to_num(np.abs(mean.values))
    senders = np.sort(np.argsort(-size.max(axis=1), kind="stable")[:_EDGES])
    receivers = np.sort(np.argsort(-size.max(axis=0), kind="stable")[:_EDGES])
    kept = dataset.isel(sender=senders, receiver=receivers)
    made = grid_panel(
        tree, "attribution/edges", kept, kept["edge"], title="edges between the strongest senders and receivers"
    )
    return [] if made is None else [made]
