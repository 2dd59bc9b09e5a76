"""`nsp ls`, `validate`, `diff` and `export`: what one does with the stores of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from nsp.cli.console import EXIT_FAILED, note, stdout
from nsp.errors import InputError

Store = Annotated[str, typer.Argument(help="A run: a directory, a .zip file or a URL.", metavar="STORE")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def register(app: typer.Typer) -> None:
    """Mount the commands on the application."""
    app.command("ls")(list_stores)
    app.command("validate")(validate_store)
    app.command("diff")(diff_stores)
    app.command("export")(export_store)


def list_stores(
    directory: Annotated[str, typer.Argument(help="Where to look for runs: a directory or a URL.", metavar="DIR")] = ".",
    as_json: AsJson = False,
) -> None:
    """List the runs under a directory, from their headers only."""
    from nsp.stores.listing import list_runs

    found = list_runs(directory)
    rows = [{"path": str(run.path)} | run.summary() for run in found]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        note(f"no runs under {directory}")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))
    stdout().print(table)


def validate_store(
    store: Store,
    deep: Annotated[bool, typer.Option("--deep", help="Read every value and compare its SHA-256.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Give damaged units up, so that the next run of the recipe computes them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a run against the schema; exit code 1 if anything is wrong."""
    from nsp.stores import open_run, open_writer, validate
    from nsp.stores.validation import to_json

    report = validate(store, deep)
    typer.echo(to_json(report) if as_json else str(report))
    if report.damaged_units:
        units = ", ".join(map(str, report.damaged_units))
        if repair:
            with open_writer(store, open_run(store).plan_hash) as writer:
                writer.invalidate(report.damaged_units)
            note(f"given up: units {units}; running the recipe again computes them, and nothing else")
        else:
            note(f"damaged: units {units}; with --repair, running the recipe again computes them, and nothing else")
    if not report.ok:
        raise typer.Exit(EXIT_FAILED)


def diff_stores(
    a: Annotated[str, typer.Argument(help="A run.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another run.", metavar="B")],
) -> None:
    """Compare two runs, aligned by coordinates; exit code 1 if their numbers differ."""
    from nsp.stores import diff

    found = diff(a, b)
    typer.echo(str(found))
    if not found.same_numbers:
        raise typer.Exit(EXIT_FAILED)


def export_store(
    store: Store,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File or directory to write.")] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", "-f", help="zip, csv, parquet or netcdf; else the suffix of --out says.")
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", "-g", help="One group only, for example effects/resid_post.")
    ] = None,
    as_zip: Annotated[
        bool, typer.Option("--zip", help="The same as --format zip: one file that opens in place.")
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="DIR", help="Write the tables that the kind of experiment defines, one csv file each."
        ),
    ] = None,
) -> None:
    """Write a run as a zip file, csv or parquet tables, or netCDF."""
    from nsp.stores import export

    if csv is not None:
        if as_zip or file_format is not None or group is not None or out is not None:
            raise InputError("--csv writes all tables of a run into its directory; it goes with no other option")
        for path in _export_tables(store, csv):
            typer.echo(str(path))
        return

    if as_zip and file_format not in (None, "zip"):
        raise InputError(f"--zip and --format {file_format} exclude each other")
    chosen = "zip" if as_zip else file_format
    if chosen is None and (out is None or not out.suffix):
        raise InputError("say what to write: --zip, --format csv|parquet|netcdf, or --out with a suffix")
    suffix = {"netcdf": ".nc"}.get(chosen or "", f".{chosen}")
    target = out if out is not None else Path(store.partition("://")[2] or store).with_suffix(suffix)
    for path in export(store, target, file_format=chosen, group=group):
        typer.echo(str(path))


def _export_tables(store: str, directory: Path) -> list[Path]:
    """The tables that the run's experiment defines; for one that defines none, each group as a long table."""
    from nsp.cli.console import open_tree
    from nsp.experiments import finished
    from nsp.stores import export, write_tables

    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; --csv takes a directory")
    tree = open_tree(store)
    tables = finished.tables(tree)
    if tables is None:
        return export(store, directory, file_format="csv")
    return write_tables(tables, directory)
