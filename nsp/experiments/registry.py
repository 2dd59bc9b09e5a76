"""The experiments that nsp has, by recipe kind. A new one is one module that calls `register`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from nsp.experiments.job import Job
from nsp.model import Model
from nsp.recipe import Recipe
from nsp.report.panels import Drawing
from nsp.report.summary import Summary, SummaryTable


@dataclass(frozen=True)
class Experiment:
    """One kind of experiment.

    Attributes:
        kind: the recipe's ``kind``; ``recipe`` its class.
        prepare: checks a recipe against a model and describes the run; everything that can be wrong is an error here.
        summarise: the summary of a finished (or unfinished) store.
        headline: its main figure in a line, for `nsp ls`; kept in the store's header when the run is complete.
        tables: the tables of `nsp export STORE --csv DIR`, each a file named by its title; by default one a group.
        report_keys: keys of the recipe that concern the summary alone, so that a finished run can be reported by others.
        panels: what the HTML report of a finished store draws; by default a drawing a group (`nsp.report.panels`).
    """

    kind: str
    recipe: type[Recipe]
    prepare: Callable[[Model, Any], Job]
    summarise: Callable[[xr.DataTree], Summary]
    headline: Callable[[xr.DataTree], str] | None = None
    tables: Callable[[xr.DataTree], Sequence[SummaryTable]] | None = None
    report_keys: tuple[str, ...] = ()
    panels: Callable[[xr.DataTree], Sequence[Drawing]] | None = None


EXPERIMENTS: dict[str, Experiment] = {}


def register(experiment: Experiment) -> Experiment:
    """Make an experiment known by its kind."""
    EXPERIMENTS[experiment.kind] = experiment
    return experiment
