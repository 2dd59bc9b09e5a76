"""Labelled results that survive anything: one zarr store a run, readable by plain xarray.

`create_run` makes a store, `open_writer` fills it unit by unit, `open_run` reads it, `validate` checks it, `diff`
compares two, `export` turns one into other formats, `list_runs` reads headers only. A location is a directory, a zip
archive, an fsspec URL (`s3://…`), or an icechunk repository (`icechunk://path`, `icechunk+s3://…`).

After kill -9 of any writer every unit reported committed is present and complete, the store opens in plain xarray, and
`open_run` never returns an uncommitted unit. Plain xarray may show uncommitted cells: filter by the coordinate `done`.
Locks between writers hold on local file systems, not on network ones.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsp.stores.committed_arrays import Damage, DamageWarning
    from nsp.stores.comparison import Difference, diff
    from nsp.stores.exporting import export, write_tables
    from nsp.stores.listing import Listed, list_runs
    from nsp.stores.names import clean_text
    from nsp.stores.reader import Run, open_run
    from nsp.stores.template import planned_bytes
    from nsp.stores.validation import Problem, Report, validate
    from nsp.stores.writer import RunWriter, create_run, open_writer

_HOMES = {
    "Damage": "committed_arrays",
    "DamageWarning": "committed_arrays",
    "Difference": "comparison",
    "Listed": "listing",
    "Problem": "validation",
    "Report": "validation",
    "Run": "reader",
    "RunWriter": "writer",
    "clean_text": "names",
    "create_run": "writer",
    "diff": "comparison",
    "export": "exporting",
    "list_runs": "listing",
    "open_run": "reader",
    "open_writer": "writer",
    "planned_bytes": "template",
    "validate": "validation",
    "write_tables": "exporting",
}

__all__ = [
    "Damage",
    "DamageWarning",
    "Difference",
    "Listed",
    "Problem",
    "Report",
    "Run",
    "RunWriter",
    "clean_text",
    "create_run",
    "diff",
    "export",
    "list_runs",
    "open_run",
    "open_writer",
    "planned_bytes",
    "validate",
    "write_tables",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: listing a thousand headers needs neither xarray nor zarr.
    if name in _HOMES:
        return getattr(import_module(f"nsp.stores.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
