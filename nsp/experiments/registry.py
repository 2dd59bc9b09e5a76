"""The experiments that nsp has, by recipe kind. A new one is one module that calls `register`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xarray as xr

from nsp.experiments.job import Job
from nsp.experiments.summary import Summary
from nsp.model import Model
from nsp.recipe import Recipe


@dataclass(frozen=True)
class Experiment:
    """One kind of experiment.

    Attributes:
        kind: the recipe's ``kind``; ``recipe`` its class.
        prepare: checks a recipe against a model and describes the run; everything that can be wrong is an error here.
        summarise: the summary of a finished (or unfinished) store.
    """

    kind: str
    recipe: type[Recipe]
    prepare: Callable[[Model, Any], Job]
    summarise: Callable[[xr.DataTree], Summary]


EXPERIMENTS: dict[str, Experiment] = {}


def register(experiment: Experiment) -> Experiment:
    """Make an experiment known by its kind."""
    EXPERIMENTS[experiment.kind] = experiment
    return experiment
