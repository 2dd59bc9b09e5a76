"""Check a run against the schema, and its values against their digests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
import zarr

from nsp.errors import NspError
from nsp.stores import digests, schema
from nsp.stores.backend import ROOT_KEY, Backend, Location, locate
from nsp.stores.describe import describe_region
from nsp.stores.hidden import damaged_nodes, hide
from nsp.stores.layout import Cell
from nsp.stores.names import true_path
from nsp.stores.units import UnitGroup, committed, read_header, unit_groups


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, at which coordinates, in which unit of work (None: no unit), and what."""

    where: str
    coordinates: str
    unit: int | None
    what: str

    def __str__(self) -> str:
        place = f" at {self.coordinates}" if self.coordinates else ""
        unit = f" (unit {self.unit})" if self.unit is not None else ""
        return f"{self.where}{place}{unit}: {self.what}"


@dataclass(frozen=True)
class Report:
    """What `validate` found. `done` of `units` are committed; `deep` says whether values were read."""

    location: str
    state: str
    units: int
    done: int
    deep: bool
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. A run that is not complete is not wrong."""
        return not self.problems

    @property
    def damaged_units(self) -> tuple[int, ...]:
        """Committed units of which something is missing or damaged: what a resume must compute again."""
        return tuple(sorted({problem.unit for problem in self.problems if problem.unit is not None}))

    def __str__(self) -> str:
        checked = "values, schema" if self.deep else "schema"
        head = f"{self.location}: {self.state}, {self.done} of {self.units} units committed, {checked} checked: "
        body = "".join(f"\n  {problem}" for problem in self.problems)
        return head + ("nothing wrong" if self.ok else f"{len(self.problems)} problems") + body


def validate(path: Location, deep: bool = False, *, storage_options: Mapping[str, Any] | None = None) -> Report:
    """Check the run at `path`: header, groups, dims, attributes, and that every committed shard is there.

    `deep` also reads every value and compares it with the SHA-256 taken when it was written. Raises NspError if there
    is no run at all.
    """
    return check(locate(path, storage_options), deep)


def check(backend: Backend, deep: bool) -> Report:
    """`validate`, for a backend."""
    try:
        header = read_header(backend)
    except NspError as error:
        if backend.get(ROOT_KEY) is None:
            raise
        return Report(backend.location, "unknown", 0, 0, deep, (Problem("header", "", None, str(error)),))
    problems = [Problem("schema", "", None, text) for text in schema.check_header(header)]
    store = backend.open_store()
    damaged = damaged_nodes(store)
    problems += [Problem(true_path(path), "", None, f"metadata is damaged: {what}") for path, what in damaged.items()]
    readable = hide(store, damaged) if damaged else store
    groups = unit_groups(zarr.open_group(readable, mode="r", zarr_format=3))
    count = int(header["units"])
    done = committed(groups, count)
    try:
        tree = xr.open_datatree(readable, engine="zarr", consolidated=False, chunks=None)
    except Exception as error:
        what = f"xarray cannot open the store: {type(error).__name__}: {error}"
        return Report(
            backend.location,
            header["state"],
            count,
            int(done.sum()),
            deep,
            (*problems, Problem("store", "", None, what)),
        )
    problems += [Problem("schema", "", None, text) for text in schema.check_tree(tree)]
    for part in groups:
        problems += _check_units(backend, part, tree[part.stored].to_dataset(), done, deep)
    problems += _check_fixed(tree, groups, deep)
    problems += _check_state(header, done)
    return Report(backend.location, str(header["state"]), count, int(done.sum()), deep, tuple(problems))


def _check_units(
    backend: Backend, part: UnitGroup, dataset: xr.Dataset, done: np.ndarray[Any, Any], deep: bool
) -> Iterator[Problem]:
    present = {name: backend.names(f"{part.stored}/{name}") for name in part.variables}
    for cell, unit in part.grid.units.items():
        if not done[unit]:
            continue
        region = part.grid.region(cell)
        coordinates = describe_region(dataset, region)
        expected = _digests(part, cell)
        for name in part.variables:
            where = f"{part.path}/{name}"
            if part.shard_key(name, cell) not in present[name]:
                yield Problem(where, coordinates, unit, "the shard is missing")
            elif isinstance(expected, str):
                yield Problem(where, coordinates, unit, expected)
            elif name not in expected:
                yield Problem(where, coordinates, unit, "no digest was written for it")
            elif deep:
                found = _read_digest(part.arrays[name], part.grid.key(part.dims(name), region))
                if found != expected[name]:
                    yield Problem(where, coordinates, unit, _mismatch(found, expected[name]))


def _check_fixed(tree: xr.DataTree, groups: tuple[UnitGroup, ...], deep: bool) -> Iterator[Problem]:
    filled = {(part.stored, name) for part in groups for name in part.variables}
    for path, node in schema.groups(tree):
        for name, variable in node.to_dataset(inherit=False).variables.items():
            if (path, name) in filled or name in schema.BOOKKEEPING or not deep:
                continue
            where = f"{true_path(path)}/{name}"
            expected = variable.attrs.get("sha256")
            if expected is None:
                yield Problem(where, "", None, "no digest was written for it")
                continue
            try:
                found = digests.digest(np.asarray(variable.values))
            except Exception as error:
                found = _failure(error)
            if found != expected:
                yield Problem(where, "", None, _mismatch(found, expected))


def _check_state(header: Mapping[str, Any], done: np.ndarray[Any, Any]) -> Iterator[Problem]:
    if header["state"] == "complete" and not done.all():
        missing = [int(index) for index in np.flatnonzero(~done)]
        yield Problem("header", "", None, f"state is 'complete', but units {missing[:10]} are not committed")


def _digests(part: UnitGroup, cell: Cell) -> dict[str, str] | str:
    origin = tuple(at * extent for at, extent in zip(cell, part.grid.extents, strict=True))
    try:
        return digests.split(str(np.asarray(part.group["sha256"][origin])))
    except Exception as error:
        return f"its digest cannot be read: {_failure(error)}"


def _read_digest(array: Any, key: tuple[slice, ...]) -> str:
    try:
        return digests.digest(np.asarray(array[key]))
    except Exception as error:
        return _failure(error)


def _mismatch(found: str, expected: str) -> str:
    if found.startswith("cannot be read"):
        return found
    return f"the values are not those that were written (SHA-256 {found[:16]}, expected {expected[:16]})"


def _failure(error: Exception) -> str:
    text = str(error).strip()
    return f"cannot be read: {text.splitlines()[0] if text else type(error).__name__}"


def to_json(report: Report) -> str:
    """The report as JSON, for scripts."""
    data = {name: getattr(report, name) for name in ("location", "state", "units", "done", "deep", "ok")}
    data["problems"] = [vars(problem) for problem in report.problems]
    return json.dumps(data, indent=2)
