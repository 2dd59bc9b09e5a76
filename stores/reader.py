"""Read a run: labelled, lazy, and never a value that was not committed."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.core import indexing

from nsp.errors import NspError
from nsp.stores import schema, summary
from nsp.stores.backend import Backend, Location, locate
from nsp.stores.committed_arrays import CommittedArray, Damage, DamageWarning
from nsp.stores.describe import describe_region
from nsp.stores.hidden import damaged_nodes, hide
from nsp.stores.names import true_path
from nsp.stores.units import UnitGroup, committed, read_header, unit_groups


def open_run(path: Location, *, storage_options: Mapping[str, Any] | None = None) -> Run:
    """Open the run at `path`: a directory, a zip archive, an fsspec URL or an icechunk repository.

    Only the header is read; `Run.tree` opens the arrays. Raises NspError if there is no run, or its header is damaged.
    """
    backend = locate(path, storage_options)
    header = read_header(backend)
    schema.require(schema.check_header(header), f"{backend.location}: the header")
    return Run(backend, header)


class Run:
    """One run as it was when first looked at; open it again to see what was committed since.

    `header` is the dict of `schema.HEADER`; `damage` lists what could not be read so far.
    """

    def __init__(self, backend: Backend, header: Mapping[str, Any]) -> None:
        self.backend = backend
        self.header: Mapping[str, Any] = dict(header)
        self.damage: list[Damage] = []

    @property
    def location(self) -> str:
        """Where the run is, as it was given."""
        return self.backend.location

    @property
    def kind(self) -> str:
        """Kind of experiment."""
        return str(self.header["kind"])

    @property
    def state(self) -> str:
        """running, complete or failed."""
        return str(self.header["state"])

    @property
    def plan_hash(self) -> str:
        """SHA-256 of the plan."""
        return str(self.header["plan_hash"])

    @property
    def recipe(self) -> Any:
        """The recipe with every default filled in, as plain data."""
        return _parsed(self.header["recipe_resolved"])

    @property
    def recipe_given(self) -> Any:
        """The recipe as the user wrote it, as plain data."""
        return _parsed(self.header["recipe_given"])

    @cached_property
    def done(self) -> np.ndarray[Any, Any]:
        """bool by unit index: whether the unit is committed."""
        return committed(self.groups, int(self.header["units"]))

    @property
    def pending(self) -> list[int]:
        """Indices of the units that are not committed."""
        return [int(index) for index in np.flatnonzero(~self.done)]

    @cached_property
    def store(self) -> Any:
        """The zarr store, read-only, without nodes whose metadata is damaged (each is warned about)."""
        store = self.backend.open_store()
        damaged = damaged_nodes(store)
        for path, what in damaged.items():
            group, _, name = path.rpartition("/")
            found = Damage(true_path(group), name, -1, "all coordinates", f"its metadata is damaged: {what}")
            self.damage.append(found)
            warnings.warn(str(found), DamageWarning, 3)
        return hide(store, damaged) if damaged else store

    @cached_property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The groups that units fill."""
        return unit_groups(zarr.open_group(self.store, mode="r", zarr_format=3))

    @cached_property
    def tree(self) -> xr.DataTree:
        """The run's groups, lazily loaded. Cells of units that are not committed read as NaN (-1 for integers).

        The coordinate `done` tells those from values that are truly NaN. Group names are the true ones
        (`effects/module:model.layers.3.mlp`).
        """
        opened = _open_tree(self.store, self.location)
        parts = {part.path: part for part in self.groups}
        datasets: dict[str, xr.Dataset] = {"/": xr.Dataset(attrs=dict(self.header))}
        for path, node in schema.groups(opened):
            dataset = node.to_dataset(inherit=False)
            name = true_path(path)
            datasets[name] = _tidy(self._masked(parts[name], dataset) if name in parts else dataset)
        return xr.DataTree.from_dict({path: datasets[path] for path in sorted(datasets, key=_group_order)})

    def refresh(self) -> Run:
        """The run as it is now."""
        return Run(self.backend, read_header(self.backend))

    def _masked(self, part: UnitGroup, dataset: xr.Dataset) -> xr.Dataset:
        marks = np.zeros(part.grid.shape, bool)
        for cell, unit in part.grid.units.items():
            marks[cell] = self.done[unit]
        masked = dataset.drop_vars(["unit", "sha256"])
        for name in part.variables:
            lazy = CommittedArray(
                part,
                name,
                marks,
                self.backend.names,
                lambda region: describe_region(dataset, region),
                self.damage.append,
            )
            old = dataset[name].variable
            masked[name] = xr.Variable(old.dims, indexing.LazilyIndexedArray(lazy), old.attrs)
        cells = np.zeros(part.grid.sizes, np.int8)
        for cell in part.grid.units:
            cells[part.grid.key(part.grid.dims, part.grid.region(cell))] = marks[cell]
        return masked.assign_coords(done=(part.grid.dims, cells, dataset["done"].attrs))

    def __repr__(self) -> str:
        return summary.text(self)

    def _repr_html_(self) -> str:
        return summary.html(self)


def _tidy(dataset: xr.Dataset) -> xr.Dataset:
    """Variables in order of name, without the store's digests."""
    for variable in dataset.variables.values():
        variable.attrs.pop("sha256", None)
    return dataset[sorted(map(str, dataset.data_vars))]


def _group_order(path: str) -> tuple[int, str]:
    top, _, rest = path.partition("/")
    return (list(schema.GROUPS).index(top) if top in schema.GROUPS else -1, rest)


def _open_tree(store: Any, location: str) -> xr.DataTree:
    try:
        return xr.open_datatree(store, engine="zarr", consolidated=False, chunks=None)
    except (ValueError, KeyError, OSError, RuntimeError, asyncio.CancelledError) as error:
        raise NspError(f"{location}: the store cannot be opened: {error}; see `nsp validate {location}`") from error


def _parsed(recipe: Any) -> Any:
    if isinstance(recipe, str):
        try:
            return json.loads(recipe)
        except ValueError:
            return recipe
    return recipe
