"""What a finished run says of itself, found by its kind and without what runs it (and so without torch).

The package of a kind says it in two modules: ``summary`` with ``summarise(tree)`` and, where the kind has them,
``headline(tree)`` and ``tables(tree)``; and ``figures`` with ``figures(tree)``. A kind that is no package of nsp's says
it by class methods of its `nsp.experiments.experiment.Experiment`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import xarray as xr

from nsp.experiments import registry
from nsp.experiments.kinds import is_package, package_of
from nsp.experiments.registry import known_kind
from nsp.report.figures import Figure
from nsp.report.summary import Summary, SummaryTable


def summary(tree: xr.DataTree, where: str = "") -> Summary:
    """The summary of a finished (or unfinished) run. InputError, headed by ``where``, for a kind that nsp does not have."""
    said: Summary = _told(known_kind(tree.attrs.get("kind"), where), "summary", "summarise", "summary")(tree)
    return said


def headline(tree: xr.DataTree) -> str | None:
    """The main figure in a line, for `nsp ls`; None where the kind has none."""
    line: str | None = _told(known_kind(tree.attrs.get("kind")), "summary", "headline", "headline")(tree)
    return line


def tables(tree: xr.DataTree) -> Sequence[SummaryTable] | None:
    """The tables that the kind exports, each a file named by its title; None: one for each group."""
    own: Sequence[SummaryTable] | None = _told(str(tree.attrs.get("kind")), "summary", "tables", "tables")(tree)
    return own


def figures(tree: xr.DataTree) -> Sequence[Figure] | None:
    """What the kind draws, the main figure first; None: a figure for each group, by its dims."""
    own: Sequence[Figure] | None = _told(str(tree.attrs.get("kind")), "figures", "figures", "figures")(tree)
    return own


def _told(kind: str, module: str, function: str, method: str) -> Callable[[xr.DataTree], Any]:
    """What a kind says by a function of its package, or by a class method; nothing for a kind that nsp does not have."""
    if is_package(kind):
        name = f"{package_of(kind)}.{module}"
        return getattr(import_module(name), function, _nothing) if find_spec(name) else _nothing
    return getattr(registry.EXPERIMENTS[kind], method) if kind in registry.EXPERIMENTS else _nothing


def _nothing(tree: xr.DataTree) -> None:
    return None
