"""Compare two runs: their numbers, aligned by coordinates, and what they were made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsp.stores import schema
from nsp.stores.backend import Location
from nsp.stores.reader import Run, open_run

COMPARED_HEADER = ("kind", "plan_hash", "recipe_resolved", "model", "seeds", "versions", "state")


@dataclass(frozen=True)
class VariableDifference:
    """How one variable differs over the cells that both runs have.

    `compared` numbers are finite in both; `unmatched` are missing or NaN in one of the two; `only_a` and `only_b`
    count cells whose coordinates the other run lacks. `largest` is the greatest absolute difference, `at` the
    coordinates of it, `a` and `b` the values there.
    """

    where: str
    compared: int
    unmatched: int
    only_a: int
    only_b: int
    largest: float
    mean: float
    at: Mapping[str, Any]
    a: Any
    b: Any

    @property
    def same(self) -> bool:
        """Whether every cell is equal, and both runs have the same cells."""
        return self.largest == 0 and not (self.unmatched or self.only_a or self.only_b)

    def __str__(self) -> str:
        if self.same:
            return f"{self.where}: {self.compared} values equal"
        parts = [f"{self.where}: {self.compared} compared"]
        if self.largest:
            place = ", ".join(f"{dim}={label}" for dim, label in self.at.items())
            parts.append(f"largest difference {self.largest:.6g} at {place or 'the value'} ({self.a} against {self.b})")
            parts.append(f"mean {self.mean:.6g}")
        for count, text in ((self.unmatched, "missing in one"), (self.only_a, "only in A"), (self.only_b, "only in B")):
            if count:
                parts.append(f"{count} {text}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Difference:
    """What `diff` found: `header` as (key, in A, in B), `variables` largest difference first, names in one run only."""

    a: str
    b: str
    header: tuple[tuple[str, Any, Any], ...]
    variables: tuple[VariableDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def same_numbers(self) -> bool:
        """Whether both runs hold the same variables with the same values."""
        return not (self.only_a or self.only_b) and all(variable.same for variable in self.variables)

    @property
    def largest(self) -> float:
        """The greatest absolute difference of any variable."""
        return max((variable.largest for variable in self.variables), default=0.0)

    def lines(self) -> list[str]:
        """The whole comparison in words."""
        found = [f"A: {self.a}", f"B: {self.b}"]
        found += [f"{key}: {_short(in_a)} against {_short(in_b)}" for key, in_a, in_b in self.header]
        found += [f"only in A: {name}" for name in self.only_a] + [f"only in B: {name}" for name in self.only_b]
        differing = [variable for variable in self.variables if not variable.same]
        found += [str(variable) for variable in differing]
        equal = len(self.variables) - len(differing)
        if equal:
            found.append(f"{equal} variables are equal value for value")
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())


def diff(a: Location | Run, b: Location | Run) -> Difference:
    """Compare two runs, given as locations or opened.

    Variables are aligned by coordinates: cells that only one run has are counted, not compared.
    """
    runs = tuple(run if isinstance(run, Run) else open_run(run) for run in (a, b))
    first, second = (dict(_variables(run.tree)) for run in runs)
    common = [name for name in first if name in second]
    found = sorted((_compare(name, first[name], second[name]) for name in common), key=lambda one: -one.largest)
    return Difference(
        runs[0].location,
        runs[1].location,
        tuple(_header_differences(*(_header(run) for run in runs))),
        tuple(found),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


def _variables(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataArray]]:
    for path, node in schema.groups(tree):
        dataset = node.to_dataset(inherit=True)
        for name in dataset.data_vars:
            yield f"{path}/{name}", dataset[name]


def _compare(name: str, a: xr.DataArray, b: xr.DataArray) -> VariableDifference:
    if set(a.dims) != set(b.dims):
        return VariableDifference(name, 0, 0, a.size, b.size, 0.0, 0.0, {}, a.dims, b.dims)
    left, right = xr.align(a.reset_coords(drop=True), b.reset_coords(drop=True), join="inner")
    x, y = left.values, right.transpose(*left.dims).values
    only = (a.size - left.size, b.size - right.size)
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biuf":
        unequal = np.asarray(x.astype(object) != y.astype(object))
        distance, both, unmatched = unequal.astype(float), np.ones(x.shape, bool), 0
    else:
        wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
        with np.errstate(invalid="ignore"):
            distance = np.where(wide_x == wide_y, 0.0, np.abs(wide_x - wide_y))
        both = ~(np.isnan(wide_x) | np.isnan(wide_y))
        unmatched = int((np.isnan(wide_x) != np.isnan(wide_y)).sum())
    if not both.any():
        return VariableDifference(name, 0, unmatched, *only, 0.0, 0.0, {}, None, None)
    distance = np.where(both, distance, 0.0)
    place = np.unravel_index(int(np.argmax(distance)), distance.shape)
    at = {str(dim): np.asarray(left[dim].values[i]).item() for dim, i in zip(left.dims, place, strict=True) if dim in left.coords}
    mean = float(distance.sum() / both.sum())
    values = (np.asarray(x[place]).item(), np.asarray(y[place]).item())
    return VariableDifference(name, int(both.sum()), unmatched, *only, float(distance[place]), mean, at, *values)


def _header(run: Run) -> dict[str, Any]:
    kept = {key: run.header.get(key) for key in COMPARED_HEADER} | {"recipe_resolved": run.recipe}
    return dict(_flat("", kept))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix.replace("recipe_resolved", "recipe", 1), value


def _header_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*a, *b]):
        in_a, in_b = a.get(key), b.get(key)
        if in_a != in_b and not (isinstance(in_a, float) and isinstance(in_b, float) and math.isnan(in_a + in_b)):
            yield key, in_a, in_b


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
