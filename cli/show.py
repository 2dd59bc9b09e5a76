"""`nsp show`: a store's summary again."""

from __future__ import annotations

from typing import Annotated

import typer

from nsp.cli.console import experiments, open_tree, render_summary, stdout
from nsp.errors import InputError
from nsp.recipe_errors import suggestion


def show(store: Annotated[str, typer.Argument(metavar="STORE", help="A store that nsp run wrote.")]) -> None:
    """Show the strongest sites of a run again."""
    tree = open_tree(store)
    kind, known = str(tree.attrs["kind"]), experiments()
    if kind not in known:
        raise InputError(f"{store}: nsp has no experiment {kind!r}{suggestion(kind, known)}")
    console = stdout()
    render_summary(console, known[kind].summarise(tree))
    console.print(f"results: {store}", soft_wrap=True)
