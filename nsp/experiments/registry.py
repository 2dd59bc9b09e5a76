"""The kinds of experiment that nsp has, by recipe kind: subclasses of `Experiment`, each known where it is defined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nsp.errors import InputError, suggestion
from nsp.experiments.kinds import RECIPES, package_of

if TYPE_CHECKING:
    from nsp.experiments.experiment import Experiment


class Registry(Mapping[str, "type[Experiment[Any]]"]):
    """The experiment of every kind. What runs one is imported, with torch, when the kind is asked for."""

    def __init__(self) -> None:
        self._registered: dict[str, type[Experiment[Any]]] = {}

    def __getitem__(self, kind: str) -> type[Experiment[Any]]:
        if kind not in self._registered and kind in RECIPES:
            import_module(f"{package_of(kind)}.experiment")
        return self._registered[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._registered or kind in RECIPES

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*RECIPES, *self._registered}))

    def __len__(self) -> int:
        return len({*RECIPES, *self._registered})

    def add(self, experiment: type[Experiment[Any]]) -> None:
        """Make an experiment, and its recipe, known by its kind."""
        self._registered[experiment.kind] = experiment
        RECIPES.add(experiment.kind, experiment.recipe_class)


_REGISTRY = Registry()
EXPERIMENTS: Mapping[str, type[Experiment[Any]]] = _REGISTRY


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
