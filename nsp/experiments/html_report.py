"""The HTML report of one run or several: what `nsp report` writes, and ``report_page`` in Python."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import xarray as xr

from nsp.errors import InputError
from nsp.experiments import finished
from nsp.experiments.run_figures import figures_of
from nsp.report.page import Section, page


def report_page(runs: Mapping[str, xr.DataTree]) -> str:
    """One self-contained HTML page: a section a run, side by side where there is room.

    Args:
        runs: by what each run is called on the page, such as the place of its store, the tree that it opens as or that
            an experiment returned.

    Raises:
        InputError: there is no run, or one of them is of no known kind.
    """
    if not runs:
        raise InputError("a report needs a run")
    return page([_section(location, tree) for location, tree in runs.items()])


def _section(location: str, tree: xr.DataTree) -> Section:
    said = finished.summary(tree, location)
    return Section(location, tree, said, _yaml(tree.attrs["recipe_resolved"]), figures_of(tree))


def _yaml(recipe: Any) -> str:
    from ruamel.yaml import YAML

    yaml, text = YAML(typ="safe"), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump({key: value for key, value in recipe.items() if value is not None}, text)
    return text.getvalue()
