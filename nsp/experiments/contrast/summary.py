"""What a contrast found, as tables: from its store alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsp.report.summary import Summary, SummaryTable

_TOP = 15
_BEST = 8  # layers shown of the control vectors
_LEVEL = 0.05


def summarise(tree: xr.DataTree) -> Summary:
    """The units that differ most, and the layers whose control vectors separate best."""
    recipe: Mapping[str, Any] = tree.attrs.get("recipe_resolved", {})
    sets = tree["inputs"].to_dataset()["set"].values.tolist()
    model = tree.attrs.get("model", {})
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {sets.count('positive')} positive and "
        f"{sets.count('negative')} negative prompts{', paired' if recipe.get('paired') else ''}",
        f"values: {'last position' if recipe.get('at') == 'last' else 'mean over positions'}",
    ]
    tables = []
    for name, node in tree["attribution"].children.items():
        if name.endswith("-neurons"):
            continue
        dataset = node.to_dataset()
        different = int((dataset["p_corrected"] <= _LEVEL).sum())
        lines.append(
            f"{name}: {different} of {dataset['p_corrected'].size} units differ ({recipe.get('correction', '?')}-corrected p at most {_LEVEL})"
        )
        if name == "mlp_neurons":
            tables.append(_units_table(name, dataset))
        taken = tree["attribution"].children.get(f"{name}-neurons")
        tables.append(_vectors_table(name, dataset, None if taken is None else taken.to_dataset()))
    if "circuit" in tree.children:
        for name, node in tree["circuit"].children.items():
            compared = node.to_dataset()
            tables.append(_comparison_table(name, compared))
            lines.append(_comparison_line(name, compared))
    return Summary("contrast", tuple(lines), tuple(tables))


def _units_table(name: str, dataset: xr.Dataset) -> SummaryTable:
    p, d = dataset["p_corrected"].values, dataset["cohen_d"].values
    size = np.abs(np.where(np.isnan(d), 0.0, d))
    # Significant ones first, then by effect size: a large d of a few prompts alone says little.
    order = np.lexsort((-size.reshape(-1), (~(p <= _LEVEL)).reshape(-1)))[:_TOP]
    rows = []
    for index in order:
        row, unit = np.unravel_index(index, d.shape)
        if size[row, unit] == 0:
            continue
        at = (int(dataset["layer"].values[row]), int(dataset["neuron"].values[unit]))
        rows.append((*at, *(float(dataset[key].values[row, unit]) for key in ("difference", "cohen_d", "p_corrected"))))
    title = f"{name}: units that differ most, significant ones first"
    return SummaryTable(title, ("layer", "neuron", "difference", "Cohen's d", "p corrected"), tuple(rows))


def _vectors_table(name: str, dataset: xr.Dataset, taken: xr.Dataset | None) -> SummaryTable:
    separation = dataset["separation"].values
    best = np.argsort(-np.nan_to_num(separation, nan=-np.inf), kind="stable")[:_BEST]
    columns: tuple[str, ...] = ("layer", "length", "held-out d", "right side")
    if taken is not None:
        columns = (*columns, "explained by 10 neurons", "by chance", "neurons taken first")
    rows = []
    for row in sorted(best):
        length = float(np.linalg.norm(dataset["vector"].values[row]))
        cells: list[Any] = [int(dataset["layer"].values[row]), length, float(separation[row]), float(dataset["right_side"].values[row])]
        if taken is not None:
            step = min(10, taken.sizes["step"]) - 1
            cells += [float(taken["explained"].values[row, step]), float(taken["by_chance"].values[row, step])]
            cells.append(", ".join(map(str, taken["pursuit_neuron"].values[row, :5].tolist())))
        rows.append(tuple(cells))
    return SummaryTable(f"{name}: control vectors, the layers that separate best", columns, tuple(rows))


def _comparison_table(name: str, compared: xr.Dataset) -> SummaryTable:
    keys = ("circuit_neurons", "shared", "overlap", "explained", "by_chance")
    rows = [
        (int(layer), *(compared[key].values[row].item() for key in keys))
        for row, layer in enumerate(compared["layer"].values)
        if compared["circuit_neurons"].values[row] > 0
    ]
    columns = ("layer", "circuit neurons", "shared", "overlap", "variance explained", "by chance")
    return SummaryTable(f"circuit and control vectors of {name}", columns, tuple(rows))


def _comparison_line(name: str, compared: xr.Dataset) -> str:
    def first(key: str) -> float:
        return float(compared[key].values[0])

    return (
        f"circuit and {name}: {first('top_overlap'):.0%} of the circuit's {first('top'):.0f} strongest neurons are among the vector's, "
        f"rank correlation {first('rank_correlation'):.2f} (p {first('rank_correlation_p'):.2g})"
    )
