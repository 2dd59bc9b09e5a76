"""The figures of a run by name: what `nsp plot --what` and ``tree.nsp.plot()`` draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from nsp.errors import InputError, suggestion
from nsp.experiments.figure_panels import (
    capture_panels,
    faithfulness_panel,
    gap_panel,
    lens_panel,
    steering_panels,
    success_panels,
)
from nsp.report.figures.prepared import Grid, Panel, Picture, stacked
from nsp.report.figures.sites import Which, base_value, effect_scatter, heatmap, layer_bars, main_variable

# What a figure needs of a run: groups that are there, and what is said of them where they are not.
_NEEDS: dict[str, tuple[str, ...]] = {
    "heatmap": ("effects",),
    "bars": ("effects",),
    "scatter": ("effects", "attribution"),
    "faithfulness": ("circuit",),
    "patchscope": ("effects/patch", "baseline"),
    "lens": ("effects/top",),
    "steering": ("effects/next_token",),
    "pair-gaps": ("baseline", "inputs"),
    "capture": ("activations",),
}
WHAT = tuple(_NEEDS)
_MOST_FOR_A_TERMINAL = 5_000_000  # numbers to read
_OF_KIND = {what: what for what in ("patchscope", "lens", "steering", "capture")} | {"bias-scan": "pair-gaps"}
_OF_ONE_KIND = {what: kind for kind, what in _OF_KIND.items()}


def usual(tree: xr.DataTree) -> str:
    """The figure that a run of this kind is drawn as when none is named."""
    return _OF_KIND.get(str(tree.attrs.get("kind")), "heatmap")


def drawable(tree: xr.DataTree, what: str) -> tuple[str, ...]:
    """What of a run a figure can be drawn of, by name: components, or ways to ablate for faithfulness curves.

    A figure of the run as a whole has one name, its own.

    Raises:
        InputError: there is no such figure, or the run has nothing for it.
    """
    if what not in WHAT:
        raise InputError(f"there is no figure {what!r}{suggestion(what, WHAT)} ({', '.join(WHAT)})")
    kind, wanted = tree.attrs.get("kind"), _OF_ONE_KIND.get(what)
    if wanted is not None and kind != wanted:
        raise InputError(f"a figure {what!r} is of a {wanted} run; this is one of {kind}: try {usual(tree)!r}")
    if missing := [group for group in _NEEDS[what] if not _has(tree, group)]:
        has = ", ".join(tree.children) or "(none)"
        raise InputError(f"a figure {what!r} needs {' and '.join(missing)}; this run has the groups {has}")
    if what == "capture":
        return tuple(map(str, tree["activations"].children))
    if wanted is not None:
        return (what,)
    group = tree[_NEEDS[what][0]]
    found = [str(name) for name, node in group.children.items() if node.to_dataset().data_vars]
    if what == "faithfulness":
        return tuple(name.removeprefix("curves-") for name in found if name.startswith("curves-"))
    return tuple(name for name in found if what != "scatter" or name in tree["attribution"].children)


def picture_of(
    tree: xr.DataTree,
    what: str | None = None,
    component: str | Sequence[str] | None = None,
    metric: str | None = None,
    pair: Which = 0,
    *,
    units: Mapping[str, int] | None = None,
    title: str = "",
) -> Picture:
    """One figure of a run, prepared: draw it with `nsp.report.figures.draw`.

    Args:
        tree: a run's results.
        what: ``heatmap`` (see `nsp.report.figures.sites.heatmap`), ``bars`` (`layer_bars`), ``scatter``
            (`effect_scatter`), ``faithfulness``, ``patchscope``, ``lens``, ``steering``, ``pair-gaps`` or ``capture``
            (see `nsp.experiments.figure_panels`); by default what suits the run.
        component: which component (which ablation for faithfulness); by default the first that the run has. Several
            are panels of one figure, with one scale.
        metric: the variable; for a scatter the attribution method. By default the effect, the first method.
        pair: for a heatmap and a lens, which pair or prompt, from 0; for a heatmap also ``mean``.
        units: for a heatmap, heads or neurons that are fixed, as ``{"head": 3}``.
        title: a line above; by default component and model.

    Raises:
        InputError: the run has no such thing.
    """
    what = what or usual(tree)
    found = drawable(tree, what)
    if not found:
        raise InputError(f"this run has nothing to draw as {what!r}")
    names = [found[0]] if component is None else [component] if isinstance(component, str) else list(component)
    for name in names:
        if name not in found:
            raise InputError(f"there is no {name!r} to draw{suggestion(name, found)} ({', '.join(found)})")
    model = str((tree.attrs.get("model") or {}).get("name", ""))
    title = title or " · ".join(part for part in (", ".join(names), model) if part)
    if what == "patchscope":
        return stacked(title, success_panels(tree), columns=3)
    if what == "steering":
        return stacked(title, steering_panels(tree), columns=2)
    if what == "capture":
        several = {name: capture_panels(tree, name) for name in names}
        one = len(names) == 1
        named = [
            (name if one else f"{each}: {name}", panel) for each in several for name, panel in several[each].items()
        ]
        return stacked(title, dict(named), columns=3)
    return stacked(title, {name: _panel(tree, what, name, metric, pair, units) for name in names})


def _panel(
    tree: xr.DataTree, what: str, name: str, metric: str | None, pair: Which, units: Mapping[str, int] | None
) -> Panel:
    if what == "faithfulness":
        return faithfulness_panel(tree, name)
    if what == "lens":
        return lens_panel(tree, pair)
    if what == "pair-gaps":
        return gap_panel(tree)
    dataset = tree[f"effects/{name}"].to_dataset()
    if what == "bars":
        return layer_bars(dataset, metric)
    if what == "scatter":
        return effect_scatter(dataset, tree["attribution"][name].to_dataset(), metric)
    wanted = metric or main_variable(dataset)
    base = None if wanted.startswith("effect") else base_value(tree, wanted, pair)
    return heatmap(with_tokens(tree, dataset), wanted, pair, base=base, units=units)


def small_heatmaps(tree: xr.DataTree) -> dict[str, Grid]:
    """Heatmaps of the main effects, layers against positions or heads, for a terminal: by component, without intervals.

    The mean over pairs; of prompts whose tokens differ, the first.
    """
    found: dict[str, Grid] = {}
    for name in drawable(tree, "heatmap") if _has(tree, "effects") else ():
        dataset = tree[f"effects/{name}"].to_dataset()
        fits = [array for array in dataset.data_vars.values() if array.dtype.kind == "f" and array.ndim]
        if not fits or "layer" not in (values := dataset[main_variable(dataset)]).dims:
            continue
        if values.size > _MOST_FOR_A_TERMINAL or not any(values.sizes.get(dim, 0) > 1 for dim in ("position", "head")):
            continue
        given = with_tokens(tree, dataset)
        try:
            found[name] = heatmap(given, str(values.name), "mean", intervals=False)
        except InputError:  # prompts have no mean by position
            found[name] = heatmap(given, str(values.name), 0, intervals=False)
    return {name: grid for name, grid in found.items() if grid.y and np.isfinite(grid.values).any()}


def with_tokens(tree: xr.DataTree, dataset: xr.Dataset) -> xr.Dataset:
    """Results whose positions are those of the inputs, with the inputs' tokens as labels."""
    texts = tree["inputs"].to_dataset().get("token_text") if "inputs" in tree.children else None
    if texts is None or "token_text" in dataset.coords:
        return dataset
    if not all(dim in dataset.coords and dataset[dim].equals(texts[dim]) for dim in texts.dims):
        return dataset
    return dataset.drop_vars("token_text", errors="ignore").assign_coords(token_text=texts)


def _has(tree: xr.DataTree, path: str) -> bool:
    top, _, rest = path.partition("/")
    return top in tree.children and (not rest or rest in tree[top].children)
