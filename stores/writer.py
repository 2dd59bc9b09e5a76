"""Create a run's store, and fill it unit by unit so that nothing committed is ever lost or half there.

Writing a unit goes: clear its markers, write one whole shard a variable and the digests, make them durable, write the
markers, make those durable. A process may be killed at any point; a unit is committed if and only if all its markers
stand, and `RunWriter.write` returns only then. Several processes write to one store at once, each to units it claimed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr

from nsp.errors import InputError, NspError
from nsp.stores import digests, encode, schema, shards, template
from nsp.stores.backend import ROOT_KEY, Backend, Location, Transaction, locate
from nsp.stores.hidden import damaged_nodes
from nsp.stores.layout import UnitLike
from nsp.stores.names import clean_json, true_path
from nsp.stores.units import UnitGroup, committed, read_header, unit_groups
from nsp.stores.validation import check

Values = Mapping[str, Mapping[str, np.ndarray[Any, Any]]]


def create_run(
    path: Location,
    tree: xr.DataTree,
    units: Sequence[UnitLike],
    *,
    header: Mapping[str, Any],
    force: bool = False,
    store_dtype: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Create the store of a run at `path`: complete in its labels, empty in its results.

    `tree` is the template: every group, variable, coordinate and attribute. In a group that some unit fills, the data
    variables are what units fill (their values in the template are ignored); all else is written now. `header` has the
    keys of `schema.HEADER`, without those that the store fills in. The store appears in one step.

    Raises InputError if something is at `path` already and not `force`, NspError if template, units or header do not
    follow the schema.
    """
    backend = locate(path, storage_options)
    encode.check_store_dtype(store_dtype)
    if not force and backend.exists():
        raise _occupied(backend)
    full = {"extra": {}} | dict(header)
    full |= {"nsp_schema": schema.SCHEMA_VERSION, "state": "running" if units else "complete", "units": len(units)}
    full.setdefault("created_at", datetime.now(UTC).isoformat(timespec="seconds"))
    with backend.staging() as built:
        template.build(built, tree, units, full, separator=backend.separator, store_dtype=store_dtype)
        try:
            backend.publish(built, replace=force)
        except FileExistsError:
            raise _occupied(backend) from None


def open_writer(path: Location, plan_hash: str, *, storage_options: Mapping[str, Any] | None = None) -> RunWriter:
    """Open the store at `path` to continue it.

    Raises InputError if the store belongs to another plan, NspError if its metadata is damaged.
    """
    backend = locate(path, storage_options)
    header = read_header(backend)
    if header["plan_hash"] != plan_hash:
        raise InputError(
            f"{backend.location} holds another plan's run: its plan is {header['plan_hash'][:16]}, this one is "
            f"{plan_hash[:16]}. --force replaces the store, --out names another place"
        )
    damaged = damaged_nodes(backend.open_store())
    if damaged:
        path, what = next(iter(damaged.items()))
        raise NspError(
            f"{backend.location} cannot be continued: the metadata of {true_path(path)} is damaged ({what}). Restore "
            f"{path}/{ROOT_KEY} from a copy, or start again with --force; what is committed elsewhere still reads"
        )
    return RunWriter(backend, header)


class RunWriter:
    """Fills a run's store unit by unit. A context manager; `work` is the usual loop."""

    def __init__(self, backend: Backend, header: Mapping[str, Any]) -> None:
        self.backend = backend
        self.count = int(header["units"])
        self._claimed: set[int] = set()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="nsp-digest")
        self._scribe = ThreadPoolExecutor(1, thread_name_prefix="nsp-write")
        self._behind: dict[int, Future[None]] = {}
        self._groups = unit_groups(zarr.open_group(backend.open_store(), mode="r", zarr_format=3))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scribe.shutdown()
        self._hasher.shutdown()

    def __repr__(self) -> str:
        return (
            f"<RunWriter {self.backend.location}: {self.count - len(self.pending())} of {self.count} units committed>"
        )

    def pending(self) -> list[int]:
        """Indices of the units that are not committed now, in order."""
        return [int(index) for index in np.flatnonzero(~self._committed())]

    @contextmanager
    def claim(self, index: int) -> Iterator[bool]:
        """Claim a unit: True inside if it is ours to compute, False if it is committed or another writer has it.

        The claim ends with the block, or with the process.
        """
        with self.backend.lock(str(index)) as held:
            if not held or self._is_committed(index):
                yield False
                return
            self._claimed.add(index)
            try:
                yield True
            finally:
                self._claimed.discard(index)

    def regions(self, index: int) -> dict[str, dict[str, slice]]:
        """What a unit fills: group path -> dim -> slice (dims not named: whole)."""
        return {part.path: part.grid.region(part.grid.cells[index]) for part in self._parts(index)}

    def work(self, units: Iterable[int] | None = None, *, poll: float = 0.5) -> Iterator[int]:
        """Every unit that is left for this writer, of ``units`` (by default of all), claimed while the caller's loop
        body runs.

        Ends when all of them are committed: while only other writers' units are left it waits, `poll` seconds at a time,
        and takes over those of a writer that died. A unit given to `write_behind` keeps its claim until it is
        committed; at most one is under way while the next is computed.
        """
        chosen = range(self.count) if units is None else frozenset(units)
        with ExitStack() as under_way:
            while pending := [index for index in self.pending() if index in chosen]:
                progressed = False
                for index in pending:
                    with ExitStack() as held:
                        if not held.enter_context(self.claim(index)):
                            continue
                        progressed = True
                        try:
                            yield index
                        finally:
                            under_way.close()  # the unit before this one is committed, or its error is raised here
                            if index in self._behind:
                                held.callback(self._finish, index)
                        if index in self._behind:
                            under_way.push(held.pop_all())
                        elif not self._is_committed(index):
                            raise NspError(f"unit {index} was left without a call to write()")
                under_way.close()
                if not progressed:
                    time.sleep(poll)

    def write_behind(self, index: int, values: Values) -> None:
        """`write` a claimed unit in the background, so that `work` goes on; the arrays must not be changed until then.

        An error of the write is raised by the next step of `work`.
        """
        self._behind[index] = self._scribe.submit(self.write, index, values)

    def _finish(self, index: int) -> None:
        self._behind.pop(index).result()

    def write(self, index: int, values: Values) -> None:
        """Commit a claimed unit: group path -> variable -> values shaped like the unit's region there.

        On return the unit is on the disk and marked. Raises NspError if a variable is missing, unknown or of another
        shape, if a value does not fit the stored dtype, or if the disk is full (what is committed stays intact).
        """
        if index not in self._claimed:
            raise NspError(f"unit {index} is not claimed by this writer; use `with writer.claim({index}) as claimed:`")
        parts = self._parts(index)
        encoded = {part.path: self._encode(index, part, values) for part in parts}
        unknown = sorted(set(values) - set(encoded))
        if unknown:
            raise NspError(f"unit {index} does not fill group {unknown[0]!r}; it fills {', '.join(encoded)}")
        with self.backend.transaction(f"writing unit {index}") as transaction:
            root = zarr.open_group(transaction.store, mode="r+", zarr_format=3)
            self._clear(transaction, [index])
            written: list[str] = []
            for part in parts:
                written += self._write_shards(transaction, root, part, part.grid.cells[index], encoded[part.path])
            transaction.flush(written)
            for part in parts:
                cell = part.grid.cells[index]
                root[part.stored]["done"][part.grid.key(part.grid.dims, part.grid.region(cell))] = np.int8(1)
            transaction.flush([part.marker_key("done", part.grid.cells[index]) for part in parts])

    def invalidate(self, indices: Iterable[int]) -> None:
        """Take the markers of these units away, so that the next run computes them again."""
        wanted = sorted(set(indices))
        if wanted:
            with self.backend.transaction(f"invalidating units {wanted}") as transaction:
                self._clear(transaction, wanted)
            self.mark("running")

    def invalidate_damaged(self, *, deep: bool = True) -> tuple[int, ...]:
        """Find committed units of which something is missing or damaged, take their markers away, and return them.

        `deep` reads every value; without it only missing shards are found, which is quick.
        """
        damaged = check(self.backend, deep).damaged_units
        self.invalidate(damaged)
        return damaged

    def mark(self, state: str) -> str:
        """Set the run's state and return what it is now: 'complete' stays 'running' while any unit is missing."""
        if state not in schema.STATES:
            raise NspError(f"state {state!r} is not one of {', '.join(schema.STATES)}")
        with self.backend.wait_lock("header"):
            if state == "complete" and self.pending():
                state = "running"
            header = read_header(self.backend)
            if header["state"] != state:
                self.update_header(lambda old: old | {"state": state})
            if state == "complete":
                self.backend.finish(header["plan_hash"])
        return state

    def update_header(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Replace the root attributes by what `change` makes of them, atomically."""
        data = self.backend.get(ROOT_KEY)
        document = json.loads(data or b"{}")
        document["attributes"] = clean_json(schema.plain(change(document["attributes"])))
        schema.require(schema.check_header(document["attributes"]), "the header")
        with self.backend.transaction("writing the header") as transaction:
            transaction.put(ROOT_KEY, json.dumps(document, indent=2, allow_nan=False).encode())

    def _parts(self, index: int) -> list[UnitGroup]:
        parts = [part for part in self._groups if index in part.grid.cells]
        if not parts:
            raise NspError(f"there is no unit {index}; units are 0 to {self.count - 1}")
        return parts

    def _committed(self) -> np.ndarray[Any, Any]:
        return committed(self._current(), self.count)

    def _is_committed(self, index: int) -> bool:
        names = {part.path for part in self._parts(index)}
        for part in self._current():
            if part.path in names:
                cell = part.grid.cells[index]
                place = tuple(at * extent for at, extent in zip(cell, part.grid.extents, strict=True))
                try:
                    if np.asarray(part.group["done"][place]) != 1:
                        return False
                except Exception:  # a marker that cannot be read marks nothing
                    return False
        return True

    def _current(self) -> tuple[UnitGroup, ...]:
        if self.backend.versioned:
            return unit_groups(zarr.open_group(self.backend.open_store(), mode="r", zarr_format=3))
        return self._groups

    def _encode(self, index: int, part: UnitGroup, values: Values) -> dict[str, np.ndarray[Any, Any]]:
        given = values.get(part.path, {})
        if set(given) != set(part.variables):
            raise NspError(
                f"unit {index} must fill {', '.join(part.variables)} of {part.path}; it was given "
                f"{', '.join(given) or 'nothing'}"
            )
        region = part.grid.region(part.grid.cells[index])
        encoded: dict[str, np.ndarray[Any, Any]] = {}
        for name, array in part.arrays.items():
            dims = part.dims(name)
            spans = zip(part.grid.key(dims, region), array.shape, strict=True)
            shape = tuple(len(range(*span.indices(size))) for span, size in spans)
            found = np.asarray(given[name])
            where = f"{part.path}/{name}"
            if found.shape != shape:
                expected = ", ".join(f"{dim} {size}" for dim, size in zip(dims, shape, strict=True))
                raise NspError(f"{where}: unit {index} gave shape {found.shape}; expected ({expected})")
            encoded[name] = encode.encode(where, found, array.dtype, array.attrs.get("store_dtype"))
        return encoded

    def _write_shards(
        self,
        transaction: Transaction,
        root: Any,
        part: UnitGroup,
        cell: tuple[int, ...],
        values: Mapping[str, np.ndarray[Any, Any]],
    ) -> list[str]:
        group, region = root[part.stored], part.grid.region(cell)
        keys: list[str] = []
        # Hashing, compressing and writing leave Python's lock: a second core does one while the first does the other.
        found = {name: self._hasher.submit(digests.digest, stored) for name, stored in values.items()}
        for name, stored in values.items():
            key = f"{part.stored}/{name}/{part.shard_key(name, cell)}"
            whole = shards.shard_parts(group[name], stored)
            if whole is not None:
                transaction.put(key, *whole)
                continue
            # A unit that holds nothing but the fill value is written too: a missing file is always damage.
            array = group[name].with_config({"write_empty_chunks": True})
            array[part.grid.key(part.dims(name), region)] = stored
            keys.append(key)
        origin = tuple(at * extent for at, extent in zip(cell, part.grid.extents, strict=True))
        group["sha256"][origin] = digests.join({name: digest.result() for name, digest in found.items()})
        return [*keys, part.marker_key("sha256", cell)]

    def _clear(self, transaction: Transaction, indices: Sequence[int]) -> None:
        markers = [part.marker_key("done", part.grid.cells[index]) for index in indices for part in self._parts(index)]
        transaction.delete(markers)


def _occupied(backend: Backend) -> InputError:
    return InputError(
        f"{backend.location} exists already. The same plan resumes there; --force replaces it, "
        "--out names another place"
    )


Claim = AbstractContextManager[bool]
