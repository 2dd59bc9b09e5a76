"""A shard laid out by nsp is the shard that zarr writes: zarr reads it, and a damaged byte is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_synthetic as synthetic
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from nsp.stores import create_run, layout, open_run, shards

DTYPES = ("float32", "float16", "int32", "int8")


@some.composite
def tilings(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(array, shard, chunk) shapes: shards of several chunks, arrays that end inside a shard or a chunk."""
    axes = draw(some.integers(1, 4))
    chunk = tuple(draw(some.lists(some.integers(1, 4), min_size=axes, max_size=axes)))
    counts = draw(some.lists(some.integers(1, 3), min_size=axes, max_size=axes))
    shard = tuple(size * count for size, count in zip(chunk, counts, strict=True))
    array = tuple(draw(some.integers(1, 2 * size)) for size in shard)
    return array, shard, chunk


def made(place: Path, array: tuple[int, ...], shard: tuple[int, ...], chunk: tuple[int, ...], dtype: str, codec: layout.Codec) -> Any:
    group = zarr.open_group(place, mode="w", zarr_format=3)
    return group.create_array(
        "value",
        shape=array,
        dtype=dtype,
        chunks=chunk,
        shards=shard,
        compressors=layout.compressors(np.dtype(dtype), codec),
        fill_value=-1,
        chunk_key_encoding={"name": "default", "separator": "."},
    )


def cells(array: tuple[int, ...], shard: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    counts = [-(-size // extent) for size, extent in zip(array, shard, strict=True)]
    return [
        (cell, tuple(slice(at * extent, min((at + 1) * extent, size)) for at, extent, size in zip(cell, shard, array, strict=True)))
        for cell in np.ndindex(*counts)
    ]


@given(tilings(), some.sampled_from(DTYPES), some.integers(0, 99))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_zarr_reads_what_is_laid_out(tmp_path: Path, shapes: Any, dtype: str, seed: int) -> None:
    array, shard, chunk = shapes
    written = made(tmp_path, array, shard, chunk, dtype, "none")
    values = (np.random.default_rng(seed).standard_normal(array) * 50).astype(dtype)
    for cell, region in cells(array, shard):
        parts = shards.shard_parts(written, values[region])
        assert parts is not None
        name = ".".join(map(str, cell))
        (tmp_path / "value" / f"c.{name}").write_bytes(b"".join(parts))
    np.testing.assert_array_equal(zarr.open_group(tmp_path, mode="r")["value"][...], values)


def test_values_are_not_copied(tmp_path: Path) -> None:
    """Large rows go out as they lie in memory, also where a chunk is a part of each."""
    written = made(tmp_path, (4, 6, 8, 2048), (4, 6, 8, 2048), (4, 1, 8, 2048), "float32", "none")
    values = np.zeros((4, 6, 8, 2048), np.float32)
    parts = shards.shard_parts(written, values)
    assert parts is not None
    rows = [part for part in parts if isinstance(part, memoryview) and part.nbytes == 8 * 2048 * 4]
    assert len(rows) == 4 * 6
    assert all(np.shares_memory(np.asarray(row), values) for row in rows)


def test_a_damaged_byte_is_found(tmp_path: Path) -> None:
    written = made(tmp_path, (4, 8), (4, 8), (2, 4), "float32", "none")
    parts = shards.shard_parts(written, np.arange(32, dtype=np.float32).reshape(4, 8))
    assert parts is not None
    whole = bytearray(b"".join(parts))
    whole[5] ^= 1
    (tmp_path / "value" / "c.0.0").write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="checksum"):
        written[...]


def test_compressed_arrays_are_left_to_zarr(tmp_path: Path) -> None:
    for codec in ("zstd", "lz4"):
        assert shards.shard_parts(made(tmp_path, (4, 8), (4, 8), (2, 4), "float32", codec), np.zeros((4, 8))) is None


@pytest.mark.parametrize(
    ("store_dtype", "lengths", "compressed"),
    [(None, 16, False), ("float16", 16, False), ("bfloat16", 16, True), (None, 4, True)],
)
def test_activations_are_compressed_where_there_is_something_to_save(
    tmp_path: Path, store_dtype: str | None, lengths: int, compressed: bool
) -> None:
    """Padding is a run of NaN, and bfloat16 is kept as float32 with an empty half; anything else is noise."""
    case = synthetic.capture(positions=32, neurons=1536)
    attrs = {"long_name": "length of the prompt in tokens", "units": "token", "method": "made up by the tests"}
    n_tokens = np.full(16, lengths)
    n_tokens[0] = 16
    case.tree["inputs"] = xr.DataTree(xr.Dataset({"n_tokens": ("prompt", n_tokens, attrs)}, {"prompt": np.arange(16)}))
    create_run(tmp_path / "a.zarr", case.tree, case.units, header=synthetic.header(), store_dtype=store_dtype)
    assert synthetic.fill(tmp_path / "a.zarr", case) == "complete"
    [path] = case.units[0].regions
    array = zarr.open_group(tmp_path / "a.zarr", mode="r")[f"{path}/{next(iter(case.tree[path].data_vars))}"]
    codecs = array.metadata.codecs[0].codecs if array.shards else array.metadata.codecs
    assert ("BloscCodec" in {type(one).__name__ for one in codecs}) == compressed
    run = open_run(tmp_path / "a.zarr")
    if store_dtype is None:
        synthetic.assert_holds(run, case)
