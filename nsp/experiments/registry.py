"""The kinds of experiment that nsp has, by recipe kind: subclasses of `Experiment`, each known where it is defined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xarray as xr

from nsp.errors import InputError
from nsp.recipe import Recipe
from nsp.recipe_errors import suggestion

if TYPE_CHECKING:
    from nsp.experiments.experiment import Experiment as ExperimentClass
    from nsp.model import Model
    from nsp.report.panels import Drawing
    from nsp.report.summary import Summary, SummaryTable


@dataclass(frozen=True)
class Experiment:
    """A kind that is not yet a subclass of `nsp.experiments.experiment.Experiment`."""

    kind: str
    recipe: type[Recipe]
    prepare: Callable[[Model, Any], Any]
    summarise: Callable[[xr.DataTree], Summary]
    headline: Callable[[xr.DataTree], str | None] = lambda tree: None
    tables: Callable[[xr.DataTree], Sequence[SummaryTable] | None] = lambda tree: None
    report_keys: tuple[str, ...] = ()
    panels: Callable[[xr.DataTree], Sequence[Drawing] | None] = lambda tree: None

    def __call__(self, model: Model, recipe: Any) -> Any:
        from nsp.experiments.job import adapted

        return adapted(self.prepare(model, recipe))

    @property
    def recipe_class(self) -> type[Recipe]:
        return self.recipe

    @property
    def summary(self) -> Callable[[xr.DataTree], Summary]:
        return self.summarise

    @property
    def figures(self) -> Callable[[xr.DataTree], Sequence[Drawing] | None]:
        return self.panels


EXPERIMENTS: dict[str, type[ExperimentClass[Any]] | Experiment] = {}


def register(experiment: Any) -> Any:
    """Make an experiment known by its kind."""
    EXPERIMENTS[experiment.kind] = experiment
    return experiment


def experiment_of(kind: Any, where: str = "") -> Any:
    """The experiment of a kind; InputError, headed by ``where``, names the nearest one that nsp has."""
    if kind not in EXPERIMENTS:
        head = f"{where}: " if where else ""
        raise InputError(f"{head}nsp has no experiment {kind!r}{suggestion(str(kind), EXPERIMENTS)}")
    return EXPERIMENTS[kind]
