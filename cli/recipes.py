"""`nsp recipes` and `nsp schema`: what ships with nsp, and the schema that editors check recipes with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from nsp.cli.console import note, recipe_kinds, stdout
from nsp.errors import InputError


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's YAML, to start your own from.")] = None,
) -> None:
    """List the recipes that ship with nsp, or print one."""
    from nsp.errors import suggestion
    from nsp.recipe import shipped_recipes

    known = shipped_recipes()
    if name is not None:
        bare = name.removesuffix(".yaml")
        if bare not in known:
            hint = suggestion(bare, known) or f" (there are {', '.join(known)})"
            raise InputError(f"no shipped recipe {name!r}{hint}")
        typer.echo(known[bare].read_text(encoding="utf-8"), nl=False)
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("description", overflow="fold")
    for bare, path in known.items():
        data = _content(path)
        table.add_row(bare, str(data.get("kind", "")), str(data.get("description", "")))
    console = stdout()
    console.print(table)
    console.print("nsp run NAME runs one; nsp recipes NAME prints it.")


def _content(path: Path) -> dict[str, Any]:
    """A shipped recipe's keys, with those of the recipe that it extends beneath them."""
    from nsp.recipe import find_recipe
    from nsp.recipe_yaml import read_document

    data = read_document(path).data
    parent = data.get("extends")
    return {**_content(find_recipe(parent, path.parent)), **data} if parent else data


def schema(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file to write; by default stdout.")] = None,
) -> None:
    """Write the JSON schema of recipes.

    A recipe whose first line is "# yaml-language-server: $schema=FILE" is then checked and completed by editors.
    """
    from nsp.recipe_schema import schema_text

    text = schema_text(recipe_kinds())
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    note(f"wrote {out}")
