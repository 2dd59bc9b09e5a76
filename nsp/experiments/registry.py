"""The kinds of experiment that nsp has, by recipe kind: subclasses of `Experiment`, each known where it is defined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import xarray as xr

from nsp.errors import InputError, suggestion
from nsp.experiments.kinds import RECIPES, package_of
from nsp.recipe import Recipe

if TYPE_CHECKING:
    from nsp.experiments.experiment import Experiment as ExperimentClass
    from nsp.model import Model
    from nsp.report.figures import Figure
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
    panels: Callable[[xr.DataTree], Sequence[Figure] | None] = lambda tree: None

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
    def figures(self) -> Callable[[xr.DataTree], Sequence[Figure] | None]:
        return self.panels


Registered: TypeAlias = "type[ExperimentClass[Any]] | Experiment"


class Registry(Mapping[str, Registered]):
    """The experiment of every kind. What runs one is imported, with torch, when the kind is asked for."""

    def __init__(self) -> None:
        self._registered: dict[str, Registered] = {}

    def __getitem__(self, kind: str) -> Registered:
        if kind not in self._registered and kind in RECIPES:
            package = package_of(kind)
            import_module(f"{package}.experiment" if find_spec(f"{package}.experiment") else f"{package}.job")
        return self._registered[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._registered or kind in RECIPES

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*RECIPES, *self._registered}))

    def __len__(self) -> int:
        return len({*RECIPES, *self._registered})

    def add(self, experiment: Registered) -> None:
        """Make an experiment, and its recipe, known by its kind."""
        self._registered[experiment.kind] = experiment
        RECIPES.add(experiment.kind, experiment.recipe_class)


_REGISTRY = Registry()
EXPERIMENTS: Mapping[str, Registered] = _REGISTRY


def register(experiment: Any) -> Any:
    """Make an experiment known by its kind."""
    _REGISTRY.add(experiment)
    return experiment


def known_kind(kind: Any, where: str = "") -> str:
    """A kind that nsp has; InputError, headed by ``where``, names the nearest one otherwise."""
    if kind not in EXPERIMENTS:
        head = f"{where}: " if where else ""
        raise InputError(f"{head}nsp has no experiment {kind!r}{suggestion(str(kind), EXPERIMENTS)}")
    return str(kind)


def experiment_of(kind: Any, where: str = "") -> Any:
    """The experiment of a kind; InputError as `known_kind` raises it."""
    return EXPERIMENTS[known_kind(kind, where)]
