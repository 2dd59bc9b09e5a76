"""Results answer for themselves: ``tree.nsp.report()`` on the tree of a run, or of a store that was opened.

Importing `nsp.experiments` registers the accessor with xarray, for trees and for datasets. Every experiment's report is
in the module ``summary`` of its package (see `nsp.experiments.finished`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

import xarray as xr
from pydantic import TypeAdapter, ValidationError

from nsp.errors import InputError, suggestion
from nsp.experiments import finished
from nsp.experiments.kinds import RECIPES
from nsp.recipe import Recipe
from nsp.report.summary import Summary


class Results:
    """``tree.nsp`` (or ``dataset.nsp``): what nsp can say of its results."""

    def __init__(self, given: xr.DataTree | xr.Dataset) -> None:
        self._given = given

    def summary(self, **keys: Any) -> Summary:
        """What the run says about its results, as data (see `summary`); a notebook shows it as tables."""
        return summary(self._given, **keys)

    def _repr_html_(self) -> str | None:
        known = isinstance(self._given, xr.DataTree) and self._given.attrs.get("kind") in RECIPES
        return self.summary()._repr_html_() if known else None

    def report(self, **keys: Any) -> str:
        """The report as text: what `nsp show` prints (see `summary`)."""
        return report(self._given, **keys)

    def plot(self, what: str | None = None, *, interactive: bool = False, **options: Any) -> Any:
        """A figure of the run (see `nsp.experiments.run_figures.picture_of`), or a heatmap of one component's dataset.

        Args:
            what: for a tree, the name of a figure that the run has, such as ``heatmap``, ``bars``, ``scatter``,
                ``faithfulness``, ``patchscope``, ``lens``, ``steering``, ``pair-gaps`` or ``capture``; by default what
                suits the run. A dataset is a heatmap.
            interactive: a plotly Figure (``pip install 'nsp[plotly]'``) in place of matplotlib's.
            options: ``component``, ``metric``, ``pair``, ``units``, ``title``; of a dataset ``metric``, ``pair``,
                ``base`` and ``units`` (see `nsp.report.site_panels.heatmap`), and ``title``.

        Returns:
            a Figure, which notebooks show; ``figure.savefig("x.png")``, of plotly ``figure.write_html("x.html")``.
        """
        from nsp.experiments.run_figures import picture, picture_of
        from nsp.report.default_figures import heatmap_figure
        from nsp.report.drawing import draw

        if isinstance(self._given, xr.DataTree):
            return draw(picture_of(self._given, what, **options), interactive=interactive)
        if what not in (None, "heatmap"):
            raise InputError(f"a dataset draws as a heatmap; for {what!r} give the run's tree")
        figure = heatmap_figure(xr.DataTree(), "effects/", self._given)
        title = options.pop("title", options.get("metric") or figure.views[0].metric)
        return draw(picture(title, [figure], **options), interactive=interactive)


# The front door (nsp/__init__.py) may have registered it already, to import this module when it is first used.
if not hasattr(xr.Dataset, "nsp"):
    xr.register_datatree_accessor("nsp")(Results)  # type: ignore[no-untyped-call]
    xr.register_dataset_accessor("nsp")(Results)  # type: ignore[no-untyped-call]


def summary(results: xr.DataTree | xr.Dataset, **keys: Any) -> Summary:
    """What a run says about its results, as data: a title, lines and tables.

    Args:
        results: the tree that an experiment returned, or that a store opens as.
        keys: keys of the run's recipe to report by in place of its own, where they concern the report alone; for
            activation patching ``statistics`` (a mapping: what it leaves out stays), ``threshold`` and ``split``.

    Raises:
        InputError: these are not the results of a run, or a key is not one of those.
    """
    if not isinstance(results, xr.DataTree):
        raise InputError("a report is of a whole run: give its tree, not one of its groups")
    kind = str(results.attrs.get("kind"))
    if kind not in RECIPES:
        raise InputError(f"this tree is not the result of an experiment that nsp knows (its kind is {kind!r})")
    if not keys:
        return finished.summary(results)
    recipe = dict(results.attrs["recipe_resolved"])
    for key, value in keys.items():
        merged = {**recipe[key], **value} if isinstance(value, Mapping) and isinstance(recipe.get(key), Mapping) else value
        recipe[key] = _checked(RECIPES[kind], key, merged)
    changed = results.copy()
    changed.attrs = {**results.attrs, "recipe_resolved": recipe}
    return finished.summary(changed)


def report(results: xr.DataTree | xr.Dataset, **keys: Any) -> str:
    """The report of a run as text: what `nsp show` prints. ``keys`` as in `summary`."""
    return str(summary(results, **keys))


def _checked(form: type[Recipe], key: str, value: Any) -> Any:
    """The value of a recipe's key as plain data, checked as the recipe checks it."""
    known = form.report_keys
    if key not in known:
        has = f"it takes {', '.join(known)}" if known else "it takes none"
        kind = get_args(form.model_fields["kind"].annotation)[0]
        raise InputError(f"the report of {kind} takes no {key!r}{suggestion(key, known)} ({has})")
    field = form.model_fields[key]
    annotation: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    try:
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (key, *first["loc"])))
        raise InputError(f"{place}: {first['msg']}, got {first['input']!r}") from None
