"""A variable as it is read: lazily, with what is not committed masked and what is damaged reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from nsp.stores.encode import fill_of
from nsp.stores.layout import Cell, index_arrays
from nsp.stores.names import is_text
from nsp.stores.units import UnitGroup


class DamageWarning(UserWarning):
    """A committed value could not be read back; the rest of the array is fine."""


@dataclass(frozen=True)
class Damage:
    """A committed shard that is missing or cannot be decoded."""

    group: str
    variable: str
    unit: int
    coordinates: str
    what: str

    def __str__(self) -> str:
        return f"{self.group}/{self.variable} at {self.coordinates} (unit {self.unit}): {self.what}"


class CommittedArray(BackendArray):
    """A zarr array of which only committed units are ever returned; other cells read as the fill value."""

    def __init__(
        self,
        part: UnitGroup,
        name: str,
        done: np.ndarray[Any, Any],
        names: Callable[[str], set[str]],
        describe: Callable[[Mapping[str, slice]], str],
        report: Callable[[Damage], None],
    ) -> None:
        self.part, self.name, self.done = part, name, done
        self.array = part.arrays[name]
        self.shape = self.array.shape
        self.dtype = np.dtype(object) if is_text(self.array.dtype) else np.dtype(self.array.dtype)
        self._names, self._describe, self._report = names, describe, report
        self._present: set[str] | None = None

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        """Values under an xarray index."""
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray[Any, Any]:
        places = list(index_arrays(key, self.shape))
        out = np.full(tuple(len(place) for place in places), fill_of(self.dtype), self.dtype)
        if out.size:
            self._fill(out, places)
        dropped = tuple(0 if isinstance(part, (int, np.integer)) else slice(None) for part in key)
        return out[dropped]

    def _fill(self, out: np.ndarray[Any, Any], places: list[np.ndarray[Any, Any]]) -> None:
        dims, grid = self.part.dims(self.name), self.part.grid
        of_dim = dict(zip(dims, places, strict=True))
        cells = [of_dim[dim] // extent for dim, extent in zip(grid.dims, grid.extents, strict=True)]
        touched: list[Cell] = [
            tuple(map(int, cell)) for cell in product(*(np.unique(at) for at in cells)) if self.done[cell]
        ]
        if self._present is None:
            self._present = self._names(f"{self.part.stored}/{self.name}")
        missing = {cell for cell in touched if self.part.shard_key(self.name, cell) not in self._present}
        whole = len(touched) == int(np.prod([len(np.unique(at)) for at in cells]))
        if whole and not missing:
            try:
                out[...] = self._get(places)
            except Exception:  # one of the shards is damaged: find out which, and keep the others
                pass
            else:
                return
        for cell in touched:
            masks = {dim: at == here for dim, at, here in zip(grid.dims, cells, cell, strict=True)}
            inside = [np.flatnonzero(masks[dim]) if dim in masks else np.arange(len(of_dim[dim])) for dim in dims]
            try:
                if cell in missing:
                    raise FileNotFoundError("the shard is missing")
                out[np.ix_(*inside)] = self._get([place[at] for place, at in zip(places, inside, strict=True)])
            except Exception as error:
                self._damaged(cell, error)

    def _get(self, places: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        if not places:
            return np.asarray(self.array[()])
        return np.asarray(self.array.oindex[tuple(_as_slice(place) for place in places)])

    def _damaged(self, cell: Cell, error: Exception) -> None:
        grid = self.part.grid
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        damage = Damage(self.part.path, self.name, grid.units[cell], self._describe(grid.region(cell)), what)
        self._report(damage)
        warnings.warn(f"{damage}; it reads as missing. Resuming the run computes this unit again", DamageWarning, 3)


def _as_slice(places: np.ndarray[Any, Any]) -> slice | np.ndarray[Any, Any]:
    """Consecutive places as a slice, which zarr reads without gathering."""
    if len(places) and np.array_equal(places, np.arange(places[0], places[0] + len(places))):
        return slice(int(places[0]), int(places[0]) + len(places))
    return places
