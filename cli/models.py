"""`nsp models`: what the catalogue offers, and fetching one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from nsp.models.catalogue import CatalogueEntry

app = typer.Typer(help="Show the models that have a short name, and fetch them.", no_args_is_help=True)

_SHOWN = ("float32", "bfloat16", "8bit", "4bit")


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per model.")] = False,
) -> None:
    """Show every catalogue model: size, layers, licence, memory per dtype, and whether it is on this disk."""
    from nsp.models.catalogue import CATALOGUE, MEMORY_NOTE

    rows = [_row(entry) for entry in CATALOGUE.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    console = Console()
    table = _table(rows)
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if not console.is_terminal:
        console.width = max(console.width, width)  # one model a line for grep, whatever the width
    elif console.width < width:
        table = _narrow_table(rows)
    console.print(table)
    console.print(MEMORY_NOTE, style="dim", highlight=False)
    console.print(
        "Gated models need their licence accepted at https://huggingface.co/<hub id> and a read token from "
        "https://huggingface.co/settings/tokens: export HF_TOKEN=hf_...",
        style="dim",
        highlight=False,
    )


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="A catalogue alias, or a hub id owner/name[@revision].")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fetch a model now, so that it loads without network afterwards."""
    from nsp.models.locate import pull as pull_model

    origin = pull_model(name, revision)
    if as_json:
        found = {
            "name": origin.name,
            "source": origin.source,
            "revision": origin.revision,
            "path": str(origin.directory),
        }
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(f"{origin.name} (revision {origin.revision}) is at {origin.directory}")


def _row(entry: CatalogueEntry) -> dict[str, Any]:
    from nsp.models.locate import on_disk

    place = on_disk(entry)
    return {
        "alias": entry.alias,
        "hub_id": entry.hub_id,
        "revision": entry.revision,
        "parameters": entry.parameters,
        "layers": entry.layers,
        "licence": entry.licence,
        "gated": entry.gated,
        "memory_bytes": entry.memory_bytes,
        "on_disk": place is not None,
        "path": None if place is None else str(place),
        "note": entry.note,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("alias", no_wrap=True)
    table.add_column("hub id", overflow="fold")
    for name in ("params", "layers"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("licence", overflow="fold")
    for name in _SHOWN:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("on disk", no_wrap=True)
    for row in rows:
        table.add_row(
            row["alias"],
            row["hub_id"],
            _count(row["parameters"]),
            str(row["layers"]),
            _licence(row),
            *_sizes(row),
        )
    return table


def _narrow_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    for name in ("fp32", "bf16", "8bit", "4bit", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        model = Text(row["alias"], style="bold")
        size = f"{_count(row['parameters'])}, {row['layers']} layers, {_licence(row)}"
        model.append(f"\n  {row['hub_id']}\n  {size}", style="not bold")
        table.add_row(model, *_sizes(row))
    return table


def _sizes(row: dict[str, Any]) -> tuple[str, ...]:
    return (*(_size(row["memory_bytes"][name]) for name in _SHOWN), "yes" if row["on_disk"] else "-")


def _licence(row: dict[str, Any]) -> str:
    return str(row["licence"]) + (" (gated)" if row["gated"] else "")


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f}G" if size >= 1e9 else f"{size / 1e6:.0f}M"
