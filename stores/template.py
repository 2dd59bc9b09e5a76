"""Build the empty store of a run in a local directory: everything but what units of work fill.

Coordinates, inputs and attributes are written whole. Variables that units fill get their metadata only, with an
explicit fill value, so that a template costs the same however large the run is.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from nsp.errors import NspError
from nsp.stores import digests, encode, layout, schema
from nsp.stores.backend import ROOT_KEY
from nsp.stores.layout import Grid, UnitLike
from nsp.stores.names import clean_json, is_text, stored_path, text_variable

WHOLE_CHUNK = 16_000_000
"""Bytes up to which a variable written at creation is one chunk."""
PADDED = 0.05
"""The share of padding above which recorded activations are compressed."""


def build(
    directory: Path,
    template: xr.DataTree,
    units: Sequence[UnitLike],
    header: Mapping[str, Any],
    *,
    separator: str,
    store_dtype: str | None,
) -> None:
    """Write the store of `template` under `directory`: root attributes `header`, one shard a unit and variable."""
    schema.require(schema.check_tree(template), "the template")
    schema.require(schema.check_header(header), "the header")
    _check_units(template, units)
    root = zarr.open_group(directory, mode="w", zarr_format=3)
    padded = _padding(template)
    for path, node in schema.groups(template):
        dataset = node.to_dataset(inherit=True)
        grid = layout.grid_of(path, {str(dim): size for dim, size in dataset.sizes.items()}, units)
        filled = [str(name) for name in dataset.data_vars] if grid is not None else []
        _write_fixed(directory, path, dataset.drop_vars(filled))
        group = root[stored_path(path)]
        if grid is not None:
            for name in filled:
                variable = dataset[name].variable
                _declare(group, path, name, variable, grid, separator, store_dtype, _codec(path, store_dtype, padded))
            _declare_bookkeeping(group, grid, separator)
    text = json.dumps(
        {"zarr_format": 3, "node_type": "group", "attributes": clean_json(schema.plain(header))},
        indent=2,
        allow_nan=False,
    )
    (directory / ROOT_KEY).write_text(text, encoding="utf-8")


def planned_bytes(template: xr.DataTree, units: Sequence[UnitLike], store_dtype: str | None = None) -> dict[str, int]:
    """Bytes before compression of what units will fill, by group: what a dry run prints."""
    touched = {path for unit in units for path in unit.regions}
    sizes: dict[str, int] = {}
    for path, node in schema.groups(template):
        if path in touched:
            variables = [node.dataset[name] for name in node.data_vars]
            kept = (encode.stored_dtype(path, variable.dtype, store_dtype, variable.encoding)[0] for variable in variables)
            sizes[path] = sum(variable.size * dtype.itemsize for variable, dtype in zip(variables, kept, strict=True))
    return sizes


def _padding(template: xr.DataTree) -> float:
    """The share of token positions at which shorter prompts hold nothing."""
    inputs = dict(schema.groups(template)).get("inputs")
    if inputs is None or "n_tokens" not in inputs.dataset or not inputs.dataset["n_tokens"].size:
        return 0.0
    lengths = inputs.dataset["n_tokens"].values
    return 1.0 - float(lengths.mean()) / max(1, int(lengths.max()))


def _codec(path: str, store_dtype: str | None, padded: float) -> layout.Codec:
    if path.partition("/")[0] != "activations":
        return "zstd"
    # Padding is a run of NaN, and half of each number is zero where bfloat16 is kept as float32.
    return "lz4" if padded > PADDED or store_dtype == "bfloat16" else "none"


def _check_units(template: xr.DataTree, units: Sequence[UnitLike]) -> None:
    known = {path for path, _ in schema.groups(template)}
    indices = [unit.index for unit in units]
    if sorted(indices) != list(range(len(units))):
        raise NspError(f"units are not numbered 0 to {len(units) - 1}, each once: {indices[:10]}")
    for unit in units:
        for path in unit.regions:
            if path not in known:
                raise NspError(f"unit {unit.index} fills group {path!r}; groups here: {', '.join(sorted(known))}")


def _write_fixed(directory: Path, path: str, dataset: xr.Dataset) -> None:
    clash = [name for name in schema.BOOKKEEPING if name in dataset.variables]
    if clash:
        raise NspError(f"{path}: {', '.join(clash)} are names that the store keeps for itself")
    plain = {name: _plain_variable(variable) for name, variable in dataset.variables.items()}
    for variable in plain.values():
        variable.attrs["sha256"] = digests.digest(np.asarray(variable.values))
    fixed = xr.Dataset(
        {name: plain[name] for name in dataset.data_vars},
        coords={name: plain[name] for name in dataset.coords},
        attrs=clean_json(schema.plain(dataset.attrs)),
    )
    encoding: dict[Any, dict[str, Any]] = {}
    for name, variable in fixed.variables.items():
        encoding[name] = {}
        if not is_text(variable.dtype):
            encoding[name]["compressors"] = layout.compressors(variable.dtype)
        if variable.ndim and variable.size and variable.nbytes <= WHOLE_CHUNK:
            encoding[name]["chunks"] = variable.shape
        if variable.dtype.kind == "f":
            encoding[name]["_FillValue"] = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        fixed.to_zarr(
            directory, group=stored_path(path), mode="a", consolidated=False, zarr_format=3, encoding=encoding
        )


def _plain_variable(variable: xr.Variable) -> xr.Variable:
    """Without an index, without inherited encoding, texts as objects, attributes as strict JSON."""
    if is_text(variable.dtype):
        made = text_variable(variable)
    else:
        made = xr.Variable(variable.dims, np.asarray(variable.values))
    made.attrs = clean_json(schema.plain(variable.attrs))
    return made


def _declare(
    group: zarr.Group,
    path: str,
    name: str,
    variable: xr.Variable,
    grid: Grid,
    separator: str,
    store_dtype: str | None,
    codec: layout.Codec,
) -> None:
    dims = tuple(map(str, variable.dims))
    lacking = [dim for dim in grid.dims if dim not in dims]
    if lacking:
        raise NspError(
            f"{path}/{name}: units split {', '.join(lacking)}, which it does not have: they would share cells"
        )
    if is_text(variable.dtype):
        _declare_text(group, name, variable, grid, dims, separator)
        return
    if variable.dtype.kind not in "fiu":
        raise NspError(f"{path}/{name}: units fill numbers and texts, not {variable.dtype}; use int8 for flags")
    if variable.dtype.kind == "u":
        raise NspError(f"{path}/{name}: unsigned integers cannot hold -1 for 'not written'; use a signed dtype")
    dtype, attrs = encode.stored_dtype(path, variable.dtype, store_dtype, variable.encoding)
    inner = layout.chunk_shape(grid, dims, variable.shape, dtype.itemsize)
    shard = layout.shard_shape(grid, dims, variable.shape, inner)
    group.create_array(
        name,
        shape=variable.shape,
        dtype=dtype,
        chunks=inner,
        shards=shard if shard != inner else None,
        compressors=layout.compressors(dtype, codec),
        fill_value=encode.fill_of(dtype),
        dimension_names=dims,
        attributes=clean_json(schema.plain(variable.attrs)) | attrs,
        chunk_key_encoding={"name": "default", "separator": separator},
    )


def _declare_text(
    group: zarr.Group, name: str, variable: xr.Variable, grid: Grid, dims: tuple[str, ...], separator: str
) -> None:
    # Texts have no fixed size, so a unit's texts are one chunk: one file, as a shard is.
    group.create_array(
        name,
        shape=variable.shape,
        dtype=str,
        chunks=tuple(max(1, grid.extent(dim, size)) for dim, size in zip(dims, variable.shape, strict=True)),
        fill_value="",
        dimension_names=dims,
        attributes=clean_json(schema.plain(variable.attrs)),
        chunk_key_encoding={"name": "default", "separator": separator},
    )


def _declare_bookkeeping(group: zarr.Group, grid: Grid, separator: str) -> None:
    owner = np.full(grid.sizes, -1, np.int32)
    for cell, unit in grid.units.items():
        owner[grid.key(grid.dims, grid.region(cell))] = unit
    kinds: dict[str, tuple[Any, Any, tuple[int, ...], Any]] = {
        "done": (np.int8, 0, grid.extents, None),
        "unit": (np.int32, -1, grid.sizes, "auto"),
        "sha256": (str, "", grid.extents, None),
    }
    for name, (dtype, fill, chunks, codecs) in kinds.items():
        array = group.create_array(
            name,
            shape=grid.sizes,
            dtype=dtype,
            chunks=tuple(max(1, size) for size in chunks),
            compressors=codecs,
            fill_value=fill,
            dimension_names=grid.dims,
            attributes={"long_name": schema.BOOKKEEPING[name], "units": "1", "method": "written by the store"},
            chunk_key_encoding={"name": "default", "separator": separator},
        )
        if name == "unit":
            array[...] = owner
    known = str(group.attrs.get("coordinates", ""))
    group.attrs["coordinates"] = " ".join([*known.split(), *schema.BOOKKEEPING])
