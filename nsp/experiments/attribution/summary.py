"""The summary of an attribution run: what was attributed, how far scores agree with exact effects, what circuits do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.experiments.attribution.recipe import NODE_METHODS, Selection
from nsp.experiments.attribution.selection import select
from nsp.experiments.attribution.verification import (
    MEASURES,
    Floats,
    areas,
    normalised,
    recall,
    size_reaching,
    sizes_of,
    spearman,
)  # fmt: skip
from nsp.report.summary import Summary, SummaryTable

_TOP = 15
_LEVEL = 0.8


def agreement(tree: xr.DataTree, component: str = "mlp_neurons", top: int | None = None) -> xr.Dataset:
    """Scores against exact effects, by method and prompt: ``spearman``, ``recall``, ``miss``; dims (component, prompt).

    The dim ``component`` names the methods. Recall and miss rate of the ``top`` units need the exact effects of all units, else NaN.
    """
    if "effects" not in tree.children or component not in tree["effects"].children:
        raise InputError(f"this run has no exact effects of {component}; run it with verify: {{exact: all}}")
    scores = tree[f"attribution/{component}"].to_dataset()
    exact = np.asarray(tree[f"effects/{component}"].to_dataset()["change"].values, dtype=np.float64)
    verify = (tree.attrs.get("recipe_resolved") or {}).get("verify") or {}
    count = int(top or verify.get("top", 50))
    methods = [str(name) for name in scores.data_vars if name in NODE_METHODS]

    def compared(measure: Callable[[Floats, Floats], float]) -> Floats:
        estimated = (np.asarray(scores[method].values, dtype=np.float64) for method in methods)
        return np.array([[measure(*pair) for pair in zip(values, exact, strict=True)] for values in estimated])

    recalled = compared(lambda estimate, truth: recall(estimate, truth, count))
    largest = f"share of the {count} units with the largest exact effects"
    columns = {
        "spearman": (compared(spearman), "rank correlation of score and exact effect"),
        "recall": (recalled, f"{largest} among the {count} with the largest scores"),
        "miss": (1 - recalled, f"{largest} that the scores miss"),
    }
    how = {"units": "1", "method": f"scores against exact effects of {component}"}
    variables = {name: (("component", "prompt"), values, {"long_name": text, **how}) for name, (values, text) in columns.items()}
    return xr.Dataset(variables, {"component": methods, "prompt": np.arange(len(exact))})


def curves(tree: xr.DataTree, ablation: str, prompt: int | None = None) -> xr.Dataset:
    """A run's curves: ``faithfulness``, ``completeness``, ``minimality``, dims (component, step); ``cpr``, ``cmd`` (component).

    The dim ``component`` names the methods, and ``random`` (the mean over draws, faithfulness alone). Measured values are averaged over
    prompts before they are normalised, as in MIB: one prompt whose metric hardly depends on the units would drown the others.
    ``prompt`` gives the curves of one prompt. Coordinates ``size`` and ``proportion`` lie along ``step``.
    """
    name = f"curves-{ablation}"
    if "circuit" not in tree.children or name not in tree["circuit"].children:
        raise InputError(f"this run has no curves with {ablation} ablation")
    stored = tree[f"circuit/{name}"].to_dataset()
    chosen = slice(None) if prompt is None else slice(prompt, prompt + 1)

    def measured(variable: str) -> Any:
        return stored[variable].values[chosen].astype(np.float64).mean(axis=0)

    empty, whole = float(measured("empty")), float(measured("whole"))
    methods = [method for method in NODE_METHODS if f"faithfulness_{method}" in stored]
    rows = [*methods, *(["random"] if "random" in stored else [])]
    by_measure = {measure: np.full((len(rows), stored.sizes["step"]), np.nan) for measure in MEASURES}
    for number, method in enumerate(methods):
        for measure in MEASURES:
            by_measure[measure][number] = normalised(measured(f"{measure}_{method}"), empty, whole)
    if "random" in stored:
        by_measure["faithfulness"][-1] = normalised(measured("random"), empty, whole).mean(axis=-1)
    # What the weakest tenth carries: the circuit's faithfulness minus that of the circuit without it.
    by_measure["minimality"] = by_measure["faithfulness"] - by_measure["minimality"]
    proportions = stored["proportion"].values
    cpr, cmd = np.array([areas(proportions.tolist(), row) for row in by_measure["faithfulness"]]).reshape(-1, 2).T
    how = {"units": "1", "method": f"{ablation} ablation; see nsp.experiments.attribution.verification"}
    variables: dict[str, Any] = {
        measure: (("component", "step"), values, {"long_name": measure, **how}) for measure, values in by_measure.items()
    }
    variables["cpr"] = (("component",), cpr, {"long_name": "area under faithfulness", **how})
    variables["cmd"] = (("component",), cmd, {"long_name": "area between faithfulness and 1", **how})
    sizes = sizes_of(proportions.tolist(), int(stored.attrs["universe"]))
    coords = {
        "component": rows, "step": np.arange(len(proportions)), "size": ("step", sizes), "proportion": ("step", proportions),
    }  # fmt: skip
    return xr.Dataset(variables, coords)


def summarise(tree: xr.DataTree) -> Summary:
    """Baselines, agreement with exact effects, curves, the knock-out, and the circuit's strongest units."""
    recipe = tree.attrs.get("recipe_resolved") or {}
    model = tree.attrs.get("model") or {}
    inputs, baseline = tree["inputs"].to_dataset(), tree["baseline"].to_dataset()
    metric = str(next(iter(baseline.data_vars)))
    values = baseline[metric].values
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {len(values)} prompt(s), donor {recipe.get('donor', '?')}",
        f"{metric}: {float(np.nanmean(values)):.4f}" + (" (mean over prompts)" if len(values) > 1 else ""),
        f"the target is the most likely token in {int((inputs['target_rank'].values == 0).sum())} of {len(values)}",
    ]
    if "left_out" in inputs.attrs:
        lines.append(
            f"{inputs.attrs['left_out']} question(s) of the set were left out, such as {next(iter(inputs.attrs['left_out_items']))}"
        )
    tables: list[SummaryTable] = []
    nodes = [name for name in tree["attribution"].children if name != "edges"]
    if "effects" in tree.children:
        tables += [_agreement_table(tree, str(name)) for name in tree["effects"].children]
    for name in tree["circuit"].children if "circuit" in tree.children else ():
        if str(name).startswith("curves-"):
            tables += _curve_tables(tree, str(name).removeprefix("curves-"))
    if "circuit" in tree.children and "knockout" in tree["circuit"].children:
        line, table = _knockout(tree, values)
        lines.append(line)
        tables.append(table)
    chosen = Selection.model_validate(recipe["select"]) if recipe.get("select") else Selection()
    tables += [shown for name in nodes if (shown := _circuit_table(tree, str(name), chosen)) is not None]
    if "edges" in tree["attribution"].children:
        tables.append(_edge_table(tree))
    return Summary("attribution", tuple(lines), tuple(tables))


def _agreement_table(tree: xr.DataTree, component: str) -> SummaryTable:
    compared = agreement(tree, component)
    exact = tree[f"effects/{component}"].to_dataset()["change"].values
    known = int((~np.isnan(exact[0])).sum())
    top = int(((tree.attrs.get("recipe_resolved") or {}).get("verify") or {}).get("top", 50))
    title = f"{component}: scores against the exact effects of {known} units" + ", means over prompts" * (len(exact) > 1)
    names = {"spearman": "spearman", "recall": f"top-{top} recall", "miss": f"top-{top} missed"}
    means = {text: compared[name].mean("prompt").values for name, text in names.items()}
    return SummaryTable.of(title, {"method": compared["component"].values, **means})


def _curve_tables(tree: xr.DataTree, ablation: str) -> list[SummaryTable]:
    by_method = curves(tree, ablation)
    sizes = by_method["size"].values
    rows: list[tuple[Any, ...]] = []
    lines: list[tuple[Any, ...]] = []
    for method in map(str, by_method["component"].values):
        curve = by_method.sel(component=method)
        reached = [size_reaching(sizes, curve["faithfulness"].values, _LEVEL, stays=stays) for stays in (False, True)]
        rows.append((method, float(curve["cpr"]), float(curve["cmd"]), *("never" if size is None else size for size in reached)))
        measures = MEASURES if method != "random" else MEASURES[:1]
        lines += [(method, measure, *(float(value) for value in curve[measure].values)) for measure in measures]
    over = f", {ablation} ablation" + (", means over prompts" if tree["inputs"].sizes["prompt"] > 1 else "")
    columns = ("method", "CPR", "CMD", f"units at which faithfulness reaches {_LEVEL:.0%}", "and stays")
    return [
        SummaryTable(f"circuits{over}", columns, tuple(rows)),
        SummaryTable(f"curves over circuit size{over}", ("method", "curve", *map(str, sizes)), tuple(lines)),
    ]


def _knockout(tree: xr.DataTree, base: np.ndarray) -> tuple[str, SummaryTable]:
    stored = tree["circuit/knockout"].to_dataset()
    own = np.abs(stored["circuit"].values - base)
    drawn = np.abs(stored["random"].values - base[:, None])
    beaten = own > drawn.max(axis=1)
    line = (
        f"scaling the circuit to 0 changes the metric more than each of {drawn.shape[1]} random circuits (as many units in each layer) "
        f"in {int(beaten.sum())} of {len(base)} prompt(s)"
    )
    columns = {
        "prompt": tree["inputs"]["name"].values, "units": stored["size"].values, "metric": base,
        "circuit at 0": stored["circuit"].values, "change": own, "random: mean change": drawn.mean(axis=1),
        "random: largest": drawn.max(axis=1),
    }  # fmt: skip
    return line, SummaryTable.of("the circuit scaled to 0", columns)


def _circuit_table(tree: xr.DataTree, component: str, chosen: Selection) -> SummaryTable | None:
    dataset = tree[f"attribution/{component}"].to_dataset()
    if "layer" not in dataset.dims or not ({"neuron", "head"} & set(dataset.dims)) or chosen.method not in dataset:
        return None
    if np.isnan(dataset[chosen.method].values).all():
        return None
    circuit = select(tree, chosen, component=component, prompt=0)
    unit = "neuron" if "neuron" in dataset.dims else "head"
    which = ", first prompt" if chosen.over == "prompt" else f", {chosen.over} over prompts"
    which *= dataset.sizes["prompt"] > 1
    rows = tuple((one.layer, one.position, one.unit, one.value) for one in circuit.top(_TOP))
    title = f"{component}: circuit by {chosen.method}, {len(circuit)} units{which}; the strongest"
    return SummaryTable(title, ("layer", "position", unit, "contribution"), rows)


def _edge_table(tree: xr.DataTree) -> SummaryTable:
    mean = tree["attribution/edges"].to_dataset()["edge"].mean("prompt")
    order = np.argsort(-np.abs(np.nan_to_num(mean.values)).reshape(-1), kind="stable")[:_TOP]
    senders, receivers = np.unravel_index(order, mean.shape)
    ends = {dim: mean[dim].values[places] for dim, places in (("sender", senders), ("receiver", receivers))}
    effects = mean.values[senders, receivers].astype(float)
    return SummaryTable.of("edges: the strongest, mean over prompts", {**ends, "effect": effects})
