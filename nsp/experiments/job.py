"""One run of an experiment, described and not yet executed: its plan, its units of work, the template of its store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np
import xarray as xr

from nsp.engine.plan import Plan

UnitValues = Mapping[str, Mapping[str, np.ndarray]]
BranchProgress = Callable[[int, int], None]  # (branches done, branches in all) of the unit at hand


@dataclass(frozen=True)
class Unit:
    """One unit of work: what it fills, as group path -> dim -> slice (dims not named: whole)."""

    index: int
    regions: Mapping[str, Mapping[str, slice]] = field(default_factory=dict)


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


def library_versions() -> dict[str, str]:
    """The versions of nsp and of the libraries that its numbers depend on."""
    found = {}
    for name in ("nsp", "torch", "transformers", "nnsight", "numpy", "xarray", "zarr", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def header_of(plan: Plan, *, given: Any, resolved: Any, device: str, seeds: Mapping[str, int]) -> dict[str, Any]:
    """The header of a run's store."""
    return {
        "kind": plan.kind,
        "plan_hash": plan.hash,
        "recipe_given": given,
        "recipe_resolved": resolved,
        "model": {**plan.model, "device": device},
        "seeds": dict(seeds),
        "versions": library_versions(),
    }
