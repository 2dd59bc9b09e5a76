"""How units of work, shards and chunks lie over an array.

One unit of work is exactly one shard (one file, one object) in each variable that it touches, so that no two writers
ever share one. Units must therefore tile each group they touch on a regular grid. Inside a shard, chunks are small
enough that one layer, or a block of its neurons, can be read without the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Any, Literal, Protocol

import numpy as np
import zarr.codecs

from nsp.errors import NspError

Cell = tuple[int, ...]

SMALL_SHARD = 1_000_000
"""Bytes below which a shard is one chunk."""
LARGE_CHUNK = 6_000_000
"""Bytes that a chunk should not exceed."""
NEURON_CHUNK = 256
PROMPT_CHUNK = 8

Codec = Literal["zstd", "lz4", "none"]


class UnitLike(Protocol):
    """A unit of work: its index, and the region it fills in each group (group path -> dim -> slice; absent = whole)."""

    @property
    def index(self) -> int: ...

    @property
    def regions(self) -> Mapping[str, Mapping[str, slice]]: ...


@dataclass(frozen=True)
class Grid:
    """How units tile one group: the dims that they split, and which unit has which cell."""

    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    extents: tuple[int, ...]
    units: Mapping[Cell, int]

    @property
    def shape(self) -> Cell:
        """Number of cells along each split dim."""
        return tuple(max(1, ceil(size / extent)) for size, extent in zip(self.sizes, self.extents, strict=True))

    @property
    def cells(self) -> Mapping[int, Cell]:
        """The cell of each unit."""
        return {unit: cell for cell, unit in self.units.items()}

    def region(self, cell: Cell) -> dict[str, slice]:
        """The slice of each split dim that `cell` covers."""
        spans = zip(self.dims, self.sizes, self.extents, cell, strict=True)
        return {dim: slice(at * extent, min((at + 1) * extent, size)) for dim, size, extent, at in spans}

    def extent(self, dim: str, size: int) -> int:
        """Length of a full unit along `dim`: the whole of a dim that is not split."""
        return self.extents[self.dims.index(dim)] if dim in self.dims else size

    def chunk_of(self, dims: Sequence[str], cell: Cell) -> Cell:
        """Index of the shard that `cell` is in a variable with `dims`."""
        at = dict(zip(self.dims, cell, strict=True))
        return tuple(at.get(dim, 0) for dim in dims)

    def key(self, dims: Sequence[str], region: Mapping[str, slice]) -> tuple[slice, ...]:
        """`region` as an index into a variable with `dims`."""
        return tuple(region.get(dim, slice(None)) for dim in dims)


def grid_of(group: str, sizes: Mapping[str, int], units: Iterable[UnitLike]) -> Grid | None:
    """The grid on which `units` tile `group`, or None if none touches it; NspError where they do not tile it.

    `sizes` gives the length of each dim of the group.
    """
    regions = {unit.index: _spans(group, sizes, unit) for unit in units if group in unit.regions}
    if not regions:
        return None
    starts = {dim: sorted({region[dim] for region in regions.values()}) for dim in sizes}
    dims = tuple(dim for dim in sizes if len(starts[dim]) > 1)
    extents: list[int] = []
    for dim in sizes:
        spans, extent = starts[dim], starts[dim][0][1] - starts[dim][0][0]
        expected = [(at, min(at + extent, sizes[dim])) for at in range(0, sizes[dim], extent or 1)] or [(0, 0)]
        if spans != expected:
            raise NspError(
                f"{group}: units do not tile {dim!r} (length {sizes[dim]}) on a regular grid: "
                f"they cover {_show(spans)}; expected {_show(expected)}"
            )
        if dim in dims:
            extents.append(extent)
    found: dict[Cell, int] = {}
    for index, region in regions.items():
        cell = tuple(region[dim][0] // extent for dim, extent in zip(dims, extents, strict=True))
        if cell in found:
            raise NspError(f"{group}: units {found[cell]} and {index} both fill {_region_text(dims, region)}")
        found[cell] = index
    grid = Grid(dims, tuple(sizes[dim] for dim in dims), tuple(extents), found)
    missing = [cell for cell in product(*map(range, grid.shape)) if cell not in found]
    if missing:
        raise NspError(f"{group}: no unit fills {grid.region(missing[0])} ({len(missing)} such cells)")
    return grid


def shard_shape(grid: Grid, dims: Sequence[str], shape: Sequence[int], inner: Sequence[int]) -> Cell:
    """Shard of a variable: a unit's extent, rounded up to whole inner chunks along dims that units do not split."""
    extents = (max(1, grid.extent(dim, size)) for dim, size in zip(dims, shape, strict=True))
    return tuple(ceil(extent / chunk) * chunk for extent, chunk in zip(extents, inner, strict=True))


def chunk_shape(grid: Grid, dims: Sequence[str], shape: Sequence[int], itemsize: int) -> Cell:
    """Inner chunk of a variable, by the rules of this module's constants."""
    extents = {dim: max(1, grid.extent(dim, size)) for dim, size in zip(dims, shape, strict=True)}
    chunk = dict(extents)

    def size() -> int:
        return prod(chunk.values()) * itemsize

    def limit(dim: str, most: int) -> None:
        if chunk.get(dim, 0) > most:
            chunk[dim] = _divisor(extents[dim], most) if dim in grid.dims else most

    for dim in ("layer", "target_layer", "component", "direction", "step"):
        if size() > SMALL_SHARD:
            limit(dim, 1)
    if size() > SMALL_SHARD and "neuron" in chunk:
        # Blocks of neurons, for looking up single ones, but of about a megabyte: zarr's own work is by the chunk.
        blocks = size() // SMALL_SHARD
        limit("neuron", NEURON_CHUNK * ceil(chunk["neuron"] / blocks / NEURON_CHUNK))
    for dim in ("pair", "prompt"):
        if size() > LARGE_CHUNK:
            limit(dim, PROMPT_CHUNK)
    while size() > LARGE_CHUNK:
        longest = max(chunk, key=lambda dim: chunk[dim])
        limit(longest, max(1, chunk[longest] // 2))
    return tuple(chunk[dim] for dim in dims)


def compressors(dtype: np.dtype[Any], codec: Codec = "zstd") -> list[Any]:
    """blosc with shuffle at level 1, or nothing, then CRC32C: a damaged chunk raises instead of reading as numbers.

    Recorded activations hardly compress (0.94 of their bytes with zstd, 0.98 with lz4) and come as fast as a model runs:
    they go to disk as they are, or, where there are runs of one value to save, with lz4 at a fifth of zstd's time.
    """
    check = zarr.codecs.Crc32cCodec()
    if codec == "none":
        return [check]
    return [zarr.codecs.BloscCodec(cname=codec, clevel=1, shuffle="shuffle", typesize=dtype.itemsize), check]


def index_arrays(
    key: Sequence[int | slice | np.ndarray[Any, Any]], shape: Sequence[int]
) -> Iterator[np.ndarray[Any, Any]]:
    """Each part of an orthogonal index as the array of places it selects."""
    for part, size in zip(key, shape, strict=True):
        yield np.atleast_1d(np.arange(size)[part])


def _spans(group: str, sizes: Mapping[str, int], unit: UnitLike) -> dict[str, tuple[int, int]]:
    spans: dict[str, tuple[int, int]] = {}
    given = unit.regions[group]
    for dim in given:
        if dim not in sizes:
            raise NspError(f"{group}: unit {unit.index} names dim {dim!r}; dims here: {', '.join(sizes)}")
    for dim, size in sizes.items():
        start, stop, step = given.get(dim, slice(None)).indices(size)
        if step != 1 or (stop <= start and size > 0):
            raise NspError(f"{group}: unit {unit.index} covers nothing, or with gaps, along {dim!r}: {given[dim]}")
        spans[dim] = (start, stop)
    return spans


def _divisor(extent: int, most: int) -> int:
    return next(size for size in range(most, 0, -1) if extent % size == 0)


def _show(spans: Sequence[tuple[int, int]]) -> str:
    shown = [f"{start}:{stop}" for start, stop in spans[:6]]
    return ", ".join(shown) + (", …" if len(spans) > 6 else "")


def _region_text(dims: Sequence[str], region: Mapping[str, tuple[int, int]]) -> str:
    return ", ".join(f"{dim} {region[dim][0]}:{region[dim][1]}" for dim in dims) or "the whole group"
