"""One run of an experiment, described and not yet executed: its plan, its units of work, the template of its store."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xarray as xr

from nsp.engine.plan import Plan
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


def library_versions() -> dict[str, str]:
    """The versions of nsp and of the libraries that its numbers depend on."""
    found = {}
    for name in ("nsp", "torch", "transformers", "nnsight", "numpy", "xarray", "zarr", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


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


def warn_nonfinite(metric: str, values: np.ndarray, there: np.ndarray, name: Callable[[tuple[int, ...]], str]) -> None:
    """Warn of values that are NaN or infinite among the cells that are ``there``; ``name`` tells people a cell."""
    bad = np.argwhere(~np.isfinite(values) & there)
    if len(bad) == 0:
        return
    named = "; ".join(name(tuple(map(int, cell))) for cell in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    message = f"{metric}: {len(bad)} of {int(there.sum())} values are NaN or infinite: {named}{more}. They are kept as they are"
    warnings.warn(message, RuntimeWarning, stacklevel=3)
