"""Which units of work a store has, which group cells they fill, and which are committed: read from its own arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from nsp.errors import InputError, NspError
from nsp.stores.backend import ROOT_KEY, Backend
from nsp.stores.layout import Cell, Grid
from nsp.stores.names import true_path
from nsp.stores.schema import BOOKKEEPING


@dataclass(frozen=True)
class UnitGroup:
    """A group that units fill: its true path, its zarr group, its grid, and the names of what units write."""

    path: str
    group: Any
    grid: Grid
    variables: tuple[str, ...]

    @property
    def stored(self) -> str:
        """The group's path in the store."""
        return str(self.group.path)

    @cached_property
    def arrays(self) -> Mapping[str, Any]:
        """The zarr arrays of `variables`."""
        return {name: self.group[name] for name in self.variables}

    def dims(self, variable: str) -> tuple[str, ...]:
        """The dims of one variable."""
        return tuple(self.arrays[variable].metadata.dimension_names)

    def shard_key(self, variable: str, cell: Cell) -> str:
        """The key, relative to the array, of the shard that holds `cell`."""
        metadata = self.arrays[variable].metadata
        return str(metadata.encode_chunk_key(self.grid.chunk_of(self.dims(variable), cell)))

    def marker_key(self, name: str, cell: Cell) -> str:
        """The key, in the store, of the chunk of `done` or `sha256` that belongs to `cell`."""
        return f"{self.stored}/{name}/{self.group[name].metadata.encode_chunk_key(cell)}"

    def read_done(self) -> np.ndarray[Any, Any]:
        """bool by cell: whether this group's part of the unit there is marked. A marker that cannot be read is not."""
        array = self.group["done"]
        origins = tuple(slice(None, None, extent) for extent in self.grid.extents)
        try:
            return np.asarray(np.asarray(array[...])[origins].reshape(self.grid.shape) == 1)
        except Exception:
            found = np.zeros(self.grid.shape, bool)
            for cell in product(*map(range, self.grid.shape)):
                place = tuple(at * extent for at, extent in zip(cell, self.grid.extents, strict=True))
                try:
                    found[cell] = array[place] == 1
                except Exception:
                    found[cell] = False
            return found


def read_header(backend: Backend) -> dict[str, Any]:
    """The root attributes of a run; NspError where there is none, or where they cannot be read."""
    data = backend.get(ROOT_KEY)
    if data is None:
        there = "something else is there" if backend.exists() else "nothing is there"
        raise InputError(f"{backend.location} is not a run of nsp: {there} (no {ROOT_KEY})")
    try:
        attributes = json.loads(data)["attributes"]
    except (ValueError, KeyError, TypeError) as error:
        raise NspError(
            f"{backend.location}: {ROOT_KEY} is damaged ({error}). The arrays below it may be intact: restore this one "
            "file from a copy, or run again with --force to replace the store"
        ) from error
    if not isinstance(attributes, dict) or "nsp_schema" not in attributes:
        raise InputError(f"{backend.location} is a zarr store, but not a run of nsp (its root has no nsp_schema)")
    return attributes


def unit_groups(root: Any) -> tuple[UnitGroup, ...]:
    """Every group of an open zarr root that units fill, by path."""
    found: list[UnitGroup] = []
    for group in _groups(root):
        arrays = dict(group.arrays())
        if not BOOKKEEPING.keys() <= arrays.keys():
            continue
        # What was written at creation carries its digest in its attributes; what units fill does not.
        filled = (name for name, array in arrays.items() if "sha256" not in array.attrs and name not in BOOKKEEPING)
        variables = tuple(sorted(filled))
        found.append(UnitGroup(true_path(group.path), group, _grid(group), variables))
    return tuple(sorted(found, key=lambda part: part.path))


def committed(groups: tuple[UnitGroup, ...], count: int) -> np.ndarray[Any, Any]:
    """bool by unit index: whether every group that the unit fills is marked."""
    done = np.ones(count, bool)
    seen = np.zeros(count, bool)
    for part in groups:
        marks = part.read_done()
        for cell, unit in part.grid.units.items():
            done[unit] &= bool(marks[cell])
            seen[unit] = True
    return done & seen


def _grid(group: Any) -> Grid:
    done, owner = group["done"], group["unit"]
    dims, sizes, extents = tuple(done.metadata.dimension_names or ()), tuple(done.shape), tuple(done.chunks)
    values = np.asarray(owner[...])
    origins = tuple(slice(None, None, extent) for extent in extents)
    units = {cell: int(unit) for cell, unit in np.ndenumerate(values[origins] if dims else values.reshape(()))}
    return Grid(dims, sizes, extents, units)


def _groups(root: Any) -> list[Any]:
    found: list[Any] = []
    for _, child in root.groups():
        found.append(child)
        found.extend(grandchild for _, grandchild in child.groups())
    return found
