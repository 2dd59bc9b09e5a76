"""The figures of a run by name: what `nsp plot --what` and ``tree.nsp.plot()`` draw."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from matplotlib.figure import Figure

from nsp.errors import InputError
from nsp.experiments.attribution.summary import curves
from nsp.recipe_errors import suggestion
from nsp.report.charts import effect_scatter, faithfulness_curves, layer_bars, main_variable
from nsp.report.figures import base_value, heatmap

WHAT = ("heatmap", "bars", "scatter", "faithfulness")


def drawable(tree: xr.DataTree, what: str) -> dict[str, xr.Dataset]:
    """What of a run a figure can be drawn of, by name: components, or ways to ablate for faithfulness curves.

    Raises:
        InputError: there is no such figure, or the run has nothing for it.
    """
    if what not in WHAT:
        raise InputError(f"there is no figure {what!r}{suggestion(what, WHAT)} ({', '.join(WHAT)})")
    groups = ["circuit"] if what == "faithfulness" else ["effects", "attribution"] if what == "scatter" else ["effects"]
    if missing := [group for group in groups if group not in tree.children]:
        has = ", ".join(tree.children) or "(none)"
        raise InputError(f"a figure {what!r} needs {' and '.join(missing)}; this run has the groups {has}")
    found = {str(name): node.to_dataset() for name, node in tree[groups[0]].children.items()}
    found = {name: dataset for name, dataset in found.items() if dataset.data_vars}
    if what == "faithfulness":
        return {name.removeprefix("curves-"): found[name] for name in found if name.startswith("curves-")}
    return {
        name: dataset for name, dataset in found.items() if what != "scatter" or name in tree["attribution"].children
    }


def figure_of(
    tree: xr.DataTree,
    what: str = "heatmap",
    component: str | None = None,
    metric: str | None = None,
    pair: int = 0,
    *,
    units: Mapping[str, int] | None = None,
    title: str = "",
) -> Figure:
    """One figure of a run.

    Args:
        tree: a run's results.
        what: ``heatmap`` (one pair; see `heatmap`), ``bars`` (`layer_bars`), ``scatter`` (`effect_scatter`) or
            ``faithfulness`` (`faithfulness_curves`).
        component: which component (which ablation for faithfulness); by default the first that the run has.
        metric: the variable; for a scatter the attribution method. By default the effect, the first method.
        pair: for a heatmap, which pair, from 0.
        units: for a heatmap, heads or neurons that are fixed, as ``{"head": 3}``.
        title: a line above; by default component and model.

    Raises:
        InputError: the run has no such thing.
    """
    found = drawable(tree, what)
    if not found:
        raise InputError(f"this run has nothing to draw as {what!r}")
    name = component or next(iter(found))
    if name not in found:
        raise InputError(f"there is no {name!r} to draw{suggestion(name, found)} ({', '.join(found)})")
    dataset = found[name]
    title = title or " · ".join(part for part in (name, str((tree.attrs.get("model") or {}).get("name", ""))) if part)
    if what == "bars":
        return layer_bars(dataset, metric, title=title)
    if what == "scatter":
        return effect_scatter(dataset, tree["attribution"][name].to_dataset(), metric, title=title)
    if what == "faithfulness":
        return faithfulness_curves(curves(tree, name), dataset.sizes.get("prompt", 1), title=title)
    dataset = _with_tokens(tree, dataset)
    wanted = metric or main_variable(dataset)
    base = None if wanted.startswith("effect") else base_value(tree, wanted, pair)
    return heatmap(dataset, wanted, pair, base=base, units=units, title=title)


def _with_tokens(tree: xr.DataTree, dataset: xr.Dataset) -> xr.Dataset:
    """Results whose positions are those of the inputs, with the inputs' tokens as labels."""
    texts = tree["inputs"].to_dataset().get("token_text") if "inputs" in tree.children else None
    if texts is None or "token_text" in dataset.coords:
        return dataset
    if not all(dim in dataset.coords and dataset[dim].equals(texts[dim]) for dim in texts.dims):
        return dataset
    return dataset.drop_vars("token_text", errors="ignore").assign_coords(token_text=texts)
