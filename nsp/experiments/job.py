"""One run of an experiment, described and not yet executed: its plan, its units of work, the template of its store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xarray as xr

from nsp.engine.plan import Plan
from nsp.experiments.experiment import library_versions
from nsp.experiments.nonfinite import warn_nonfinite as warn_nonfinite
from nsp.progress import BranchProgress as BranchProgress
from nsp.recipe import Recipe

UnitValues = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Unit:
    """One unit of work: what it fills, as group path -> dim -> slice (dims not named: whole)."""

    index: int
    regions: Mapping[str, Mapping[str, slice]] = field(default_factory=dict)


def blocks(count: int, size: int, groups: Iterable[str], dim: str = "prompt") -> tuple[Unit, ...]:
    """Units that fill ``groups`` in blocks of ``size`` along ``dim``, which has ``count`` places."""
    filled = list(groups)
    spans = [slice(low, min(low + size, count)) for low in range(0, count, size)]
    return tuple(Unit(number, {group: {dim: span} for group in filled}) for number, span in enumerate(spans))


class Job(Protocol):
    """Everything about one run."""

    @property
    def plan(self) -> Plan:
        """The plan, with its schedule."""
        ...

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of work, a regular tiling of what they fill."""
        ...

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says about the run."""
        ...

    def template(self) -> xr.DataTree:
        """All groups, coordinates and attributes; inputs filled, results NaN."""
        ...

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Compute one unit: group path -> variable -> array shaped like the unit's region."""
        ...


@runtime_checkable
class ReadsItsStore(Protocol):
    """A job with units that need what others computed, perhaps in an earlier run."""

    def attach(self, stored: Callable[[], xr.DataTree]) -> None:
        """Be told where the run's results can be read; units that are not finished there are blank."""
        ...


def header_of(plan: Plan, recipe: Recipe, device: str, seeds: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The header of a run's store; ``seeds`` are those beside the recipe's own."""
    return {
        "kind": plan.kind,
        "plan_hash": plan.hash,
        "recipe_given": recipe.model_dump(mode="json", exclude_unset=True),
        "recipe_resolved": recipe.model_dump(mode="json"),
        "model": {**plan.model, "device": device},
        "seeds": {"recipe": recipe.seed, **(seeds or {})},
        "versions": library_versions(),
    }


class _Adapted:
    """A job of the old form as the core runs it, until its kind is an `Experiment`."""

    def __init__(self, job: Job) -> None:
        from nsp.experiments import experiment

        self.job, self.plan, self.header = job, job.plan, dict(job.header)
        self.reads = isinstance(job, ReadsItsStore)
        self.units = tuple(
            experiment.Unit(unit.index, unit.index if self.reads else 0, {}, unit.regions) for unit in job.units
        )
        self.blanks = {node.path.strip("/"): node.to_dataset() for node in job.template().subtree if node.parent}

    def template(self) -> xr.DataTree:
        return self.job.template()

    def needs(self, unit: Any) -> tuple[str, ...]:
        return tuple(self.blanks) if self.reads else ()

    def compute(self, unit: Any, stored: Callable[[str], xr.Dataset], progress: Any = None) -> UnitValues:
        if isinstance(self.job, ReadsItsStore):
            self.job.attach(lambda: xr.DataTree.from_dict({path: stored(path) for path in self.blanks}))
        return self.job.run_unit(self.job.units[unit.index], progress)


def adapted(job: Any) -> Any:
    """A run as the core knows it."""
    return job if hasattr(job, "compute") else _Adapted(job)
