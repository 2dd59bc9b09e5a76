"""A run in other formats: long tables (csv, parquet), netCDF, and one zip file that opens in place."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray as xr

from nsp.errors import InputError
from nsp.stores import archive, disk, schema
from nsp.stores.backend import Location
from nsp.stores.local import LocalBackend
from nsp.stores.names import is_text, stored_path
from nsp.stores.reader import Run, open_run

FORMATS = ("zip", "csv", "parquet", "netcdf")
SUFFIXES = {".zip": "zip", ".csv": "csv", ".parquet": "parquet", ".nc": "netcdf"}


class TableLike(Protocol):
    """A table that an experiment defines: plain data."""

    @property
    def title(self) -> str: ...

    @property
    def columns(self) -> Sequence[str]: ...

    @property
    def rows(self) -> Sequence[Sequence[Any]]: ...


def export(
    run: Run | Location, out: str | Path, *, file_format: str | None = None, group: str | None = None
) -> list[Path]:
    """Write the run to `out` as zip, csv, parquet or netCDF, and return the files written.

    Without `file_format` the suffix of `out` decides. csv and parquet are long tables, one row a cell, coordinates as
    columns: with `group` (`effects/resid_post`) `out` is that group's file, otherwise a directory with one file a
    group. netCDF holds all groups in one file (needs h5netcdf), or one group. Rows of units that are not committed are
    left out of tables. Raises InputError for an unknown format or group.
    """
    target = Path(out)
    chosen = file_format or SUFFIXES.get(target.suffix)
    if chosen not in FORMATS:
        raise InputError(f"export to {out}: format {file_format or target.suffix!r} is not one of {', '.join(FORMATS)}")
    opened = run if isinstance(run, Run) else open_run(run)
    if chosen == "zip":
        return [_export_zip(opened, target)]
    with disk.explain_disk(str(target), "exporting"):
        if chosen == "netcdf":
            return [_export_netcdf(opened, target, group)]
        if group is not None:
            _write_frame(_frame(_dataset(opened, group)), target, chosen)
            return [target]
        suffix = "." + chosen
        # `out.csv` for a whole run is a directory of that name: one table cannot hold groups of different dims.
        return [
            _write_frame(_frame(dataset), target / (path.replace("/", ".") + suffix), chosen)
            for path, dataset in _tables(opened)
        ]


def write_tables(tables: Sequence[TableLike], directory: str | Path, *, file_format: str = "csv") -> list[Path]:
    """Write tables that an experiment defines, one file each, named by their titles."""
    if file_format not in ("csv", "parquet"):
        raise InputError(f"tables are written as csv or parquet, not {file_format!r}")
    written: list[Path] = []
    for table in tables:
        name = "-".join("".join(c if c.isalnum() or c == "_" else " " for c in table.title).lower().split())
        frame = pd.DataFrame([list(row) for row in table.rows], columns=list(table.columns))
        written.append(_write_frame(frame, Path(directory) / f"{name}.{file_format}", file_format))
    return written


def _export_zip(run: Run, target: Path) -> Path:
    if not isinstance(run.backend, LocalBackend):
        raise InputError(f"{run.location}: only a run in a local directory is packed into a zip file")
    if run.pending:
        raise InputError(
            f"{run.location} has {len(run.pending)} units missing; finish it first (`nsp run` on the same recipe "
            "resumes it): a zip file cannot be resumed"
        )
    archive.pack(run.backend.path, target)
    return target


def _export_netcdf(run: Run, target: Path, group: str | None) -> Path:
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    if group is not None:
        dataset = _netcdf_ready(_dataset(run, group))
        dataset.attrs |= {key: _attribute(value) for key, value in run.header.items()}
        dataset.to_netcdf(target, engine="h5netcdf" if _has("h5netcdf") and _has("h5py") else "scipy")
        return target
    if not (_has("h5netcdf") and _has("h5py")):
        raise InputError(
            "netCDF files with groups need h5netcdf and h5py: pip install 'nsp[netcdf]'; "
            "or export one group with --group"
        )
    tree = {path: _netcdf_ready(node.to_dataset(inherit=False)) for path, node in schema.groups(run.tree)}
    root = xr.Dataset(attrs={key: _attribute(value) for key, value in run.header.items()})
    named = {path.replace(":", "_"): dataset for path, dataset in tree.items()}
    xr.DataTree.from_dict({"/": root} | named).to_netcdf(target, engine="h5netcdf")
    return target


def _tables(run: Run) -> Iterator[tuple[str, xr.Dataset]]:
    for path, node in schema.groups(run.tree):
        dataset = node.to_dataset(inherit=True)
        shapes = {dataset[name].dims for name in dataset.data_vars}
        if len(shapes) <= 1:
            if dataset.data_vars:
                yield stored_path(path), dataset
            continue
        for dims in sorted(shapes, key=str):
            names = [name for name in dataset.data_vars if dataset[name].dims == dims]
            yield f"{stored_path(path)}.{'-'.join(map(str, dims)) or 'single'}", dataset[names]


def _dataset(run: Run, group: str) -> xr.Dataset:
    known = [path for path, node in schema.groups(run.tree) if node.data_vars]
    if group.strip("/") not in known:
        raise InputError(f"{run.location} has no group {group!r} with data; it has {', '.join(known)}")
    return next(node for path, node in schema.groups(run.tree) if path == group.strip("/")).to_dataset(inherit=True)


def _frame(dataset: xr.Dataset) -> pd.DataFrame:
    if not dataset.data_vars:
        return pd.DataFrame()
    dims = list(dict.fromkeys(dim for name in dataset.data_vars for dim in dataset[name].dims))
    kept = dataset.drop_vars([name for name in dataset.coords if not set(dataset[name].dims) <= set(dims)])
    if not dims:
        frame = pd.DataFrame([{name: kept[name].item() for name in kept.variables}])
    else:
        frame = kept.to_dataframe(dim_order=dims).reset_index()
    if "done" in frame:
        frame = frame[frame["done"] == 1].drop(columns="done")
    return frame.reset_index(drop=True)


def _write_frame(frame: pd.DataFrame, path: Path, file_format: str) -> Path:
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    if file_format == "csv":
        # Every text quoted: prompts hold commas, quotes and newlines. NUL cannot stand in csv.
        shown = frame.map(lambda value: value.replace("\0", "\\x00") if isinstance(value, str) else value)
        shown.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)
        return path
    if not _has("pyarrow"):
        raise InputError('parquet needs pyarrow: pip install "nsp[parquet]"; or export csv')
    frame.to_parquet(path, index=False)
    return path


def _netcdf_ready(dataset: xr.Dataset) -> xr.Dataset:
    made = dataset.copy()
    for name in list(made.variables):
        variable = made[name].variable
        attrs = {key: _attribute(value) for key, value in variable.attrs.items()}
        values = variable
        if is_text(variable.dtype):
            # netCDF texts end at a NUL.
            texts = np.array([str(text).replace("\0", "\\x00") for text in variable.values.ravel()], dtype=object)
            values = xr.Variable(variable.dims, texts.reshape(variable.shape))
        elif variable.dtype == np.float16:
            values = variable.astype(np.float32)
        made[name] = xr.Variable(values.dims, values.data, attrs)
    made.attrs = {key: _attribute(value) for key, value in dataset.attrs.items()}
    return made


def _attribute(value: Any) -> Any:
    return value if isinstance(value, (str, int, float)) and not isinstance(value, bool) else json.dumps(value)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
