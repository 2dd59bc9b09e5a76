"""The figures of a run by name: what `nsp plot --what`, ``tree.nsp.plot()``, the report and `nsp show` draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.errors import InputError, suggestion
from nsp.experiments import finished
from nsp.report.default_figures import figures_by_dims, heatmap_figure
from nsp.report.figures import Figure, Grid, Panel, Picture, View, Which, same_scale
from nsp.report.site_panels import main_variable

# Figures by their names, and which runs have them; a kind may have others.
WHAT = {
    "heatmap": "any run with effects",
    "bars": "any run with effects by layer",
    "lines": "any run whose results lie along layers alone",
    "scatter": "an attribution run with exact effects",
    "faithfulness": "an attribution run with circuits",
    "patchscope": "a patchscope run",
    "lens": "a lens run",
    "steering": "a steering run",
    "pair-gaps": "a bias-scan run",
    "capture": "a capture run",
}
_MOST_FOR_A_TERMINAL = 5_000_000  # numbers to read
_OWN = ("patchscope", "lens", "steering", "pair-gaps", "capture")  # what a run of that kind is drawn as


def figures_of(tree: xr.DataTree) -> Sequence[Figure]:
    """What a run shows, the main figure first; an unfinished run is drawn group by group, blank where it is not done."""
    whole = tree.attrs.get("state") in (None, "complete")
    figures = finished.figures(tree) if whole else None
    return figures_by_dims(tree) if figures is None else figures


def named(tree: xr.DataTree, what: str | None = None) -> list[Figure]:
    """The figures of one name; by default those that suit the run: what only its kind has, else heatmaps, else its first.

    Raises:
        InputError: the run has no such figure.
    """
    figures = figures_of(tree)
    names = list(dict.fromkeys(figure.what for figure in figures))
    if not names:
        raise InputError(f"this run has nothing to draw; it has the groups {', '.join(tree.children) or '(none)'}")
    usual = names[0] if names[0] in _OWN or "heatmap" not in names else "heatmap"
    what = what or usual
    if what not in names:
        kind, has = tree.attrs.get("kind"), ", ".join(names)
        if what in WHAT:
            raise InputError(f"a figure {what!r} is of {WHAT[what]}; this is one of {kind}, which has {has}: try {usual!r}")
        raise InputError(f"there is no figure {what!r}{suggestion(what, dict.fromkeys([*names, *WHAT]))}; this run has {has}")
    return [figure for figure in figures if figure.what == what]


def drawable(tree: xr.DataTree, what: str | None = None) -> tuple[str, ...]:
    """What of a run a figure can be drawn of, by name: components, or ways to ablate for faithfulness curves."""
    views = (view for figure in named(tree, what) for view in figure.views)
    return tuple(dict.fromkeys(view.component for view in views if view.component))


def picture_of(
    tree: xr.DataTree,
    what: str | None = None,
    component: str | Sequence[str] | None = None,
    metric: str | None = None,
    pair: Which | None = None,
    *,
    units: dict[str, int] | None = None,
    title: str = "",
) -> Picture:
    """One figure of a run as panels: draw it with `nsp.report.drawing.draw`.

    Args:
        tree: a run's results.
        what: the figure's name, such as ``heatmap`` or ``bars`` (`WHAT` has those of several kinds); by default the
            run's first.
        component: which component (which ablation for faithfulness); by default the first that the run has. Several
            are panels of one figure, with one scale.
        metric: the variable; for a scatter the attribution method. By default the effect, the first method.
        pair: for a heatmap and a lens, which pair or prompt, from 0, or ``mean``; by default the first.
        units: heads or neurons that are fixed, as ``{"head": 3}``.
        title: a line above; by default component and model.

    Raises:
        InputError: the run has no such thing.
    """
    figures = named(tree, what)
    known = drawable(tree, figures[0].what)
    names = known[:1] if component is None else [component] if isinstance(component, str) else list(component)
    for name in names:
        _check("", name, known)
    model = str((tree.attrs.get("model") or {}).get("name", ""))
    title = title or " · ".join(part for part in (", ".join(names) or figures[0].title, model) if part)
    return picture(title, figures, names, metric, pair, units=units)


def picture(
    title: str,
    figures: Iterable[Figure],
    components: Sequence[str] = (),
    metric: str | None = None,
    pair: Which | None = None,
    **options: Any,
) -> Picture:
    """The chosen views of some figures, as panels whose headings say what tells them apart.

    ``options`` of a heatmap: ``units`` that are fixed, and the ``base`` around which colours diverge.
    """
    chosen = [
        (figure, view) for figure in figures for name in components or [""] for view in _chosen(figure, name, metric, pair)
    ]
    given = {name: value for name, value in options.items() if value}
    if given and any(figure.what != "heatmap" for figure, _ in chosen):
        raise InputError(f"{' and '.join(given)} choose what a heatmap shows; leave them out for another figure")
    each = [view.component for _, view in chosen], [figure.title for figure, _ in chosen], [view.name for _, view in chosen]
    telling = [names for names in each if len(set(names)) > 1]
    alone = next((names for names in telling if len(set(names)) == len(chosen)), None)
    headings = alone or [": ".join(parts) for parts in zip(*telling, strict=True)] or [""]
    panels = same_scale(view.make(**given) if given else view.panel for _, view in chosen)
    by_component = len(set(each[0])) == len(chosen)
    columns = 1 if by_component else 2 if len(chosen) % 3 else 3
    return Picture(title, tuple(zip(headings, panels, strict=True)), columns)


def _chosen(figure: Figure, component: str, metric: str | None, pair: Which | None) -> list[View]:
    """The views of a figure to draw beside each other: one, unless the figure says that more are."""
    views = [view for view in figure.views if view.component == component] if component else list(figure.views)
    metrics = list(dict.fromkeys(view.metric for view in views if view.metric))
    if metrics:
        wanted = metric or metrics[0]
        _check("metric ", wanted, metrics)
        views = [view for view in views if view.metric == wanted]
    items = [view.item for view in views if view.item is not None]
    if not views or views[0].item is None:
        return views[: figure.abreast]
    numbers = [item for item in items if item != "mean"]
    if pair is None or (pair == "mean" and len(numbers) == 1):
        pair = numbers[0]
    if pair not in items:
        outer = views[-1].name.partition(" ")[0] or "pair"
        has = f"{outer} 0 only" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        raise InputError(figure.no_mean if pair == "mean" else f"there is no {outer} {pair}; the store has {has}")
    return [view for view in views if view.item == pair][: figure.abreast]


def _check(sort: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"there is no {sort}{name!r} to draw{suggestion(name, known)} ({', '.join(known)})")


def small_heatmaps(tree: xr.DataTree) -> dict[str, Panel]:
    """Heatmaps of every group of effects that lies along layers and positions or heads, for a terminal: by group.

    The mean over pairs; of prompts whose tokens differ, the first.
    """
    stated = {figure.views[0].component: figure for figure in figures_of(tree) if figure.what == "heatmap"}
    grids: dict[str, Panel] = {}
    for name, node in tree["effects"].children.items() if "effects" in tree.children else ():
        dataset = node.to_dataset()
        if not any(array.dtype.kind == "f" and array.ndim for array in dataset.data_vars.values()):
            continue
        values = dataset[main_variable(dataset)]
        along = any(values.sizes.get(dim, 0) > 1 for dim in ("position", "head"))
        if "layer" not in values.dims or not along or values.size > _MOST_FOR_A_TERMINAL:
            continue
        view = (stated.get(name) or heatmap_figure(tree, f"effects/{name}")).views[0]
        panel = view.panel
        if view.metric in dataset and isinstance(panel, Grid) and panel.y and np.isfinite(panel.values).any():
            grids[name] = panel
    return grids
