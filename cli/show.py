"""`nsp show`: a store's summary again, with small heatmaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nsp.cli.backends import jobs_line
from nsp.cli.console import open_tree, render_summary, stdout

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console

_MOST_HEATMAPS = 4


def show(store: Annotated[str, typer.Argument(metavar="STORE", help="A store that nsp run wrote.")]) -> None:
    """Show a run again: its findings, and small heatmaps of its effects."""
    tree = open_tree(store)
    from nsp.experiments import finished

    console = stdout()
    render_summary(console, finished.summary(tree, store))
    if line := jobs_line(tree.attrs):
        console.print(line, soft_wrap=True)
    _heatmaps(console, tree)
    console.print(f"results: {store}", soft_wrap=True)


def _heatmaps(console: Console, tree: xr.DataTree) -> None:
    """The main effects by layer and position, or head; characters carry the values, so that a pipe has them too."""
    from nsp.experiments.run_figures import small_heatmaps
    from nsp.report.drawing.terminal import draw_text

    grids = small_heatmaps(tree)
    for name, grid in list(grids.items())[:_MOST_HEATMAPS]:
        title = ", ".join(part for part in (f"{name}: {grid.quantity}", grid.remark) if part)
        console.print(draw_text(grid, title, console.width, console.encoding))
        console.print()
    if left := list(grids)[_MOST_HEATMAPS:]:
        console.print(f"nsp plot draws the other components too: {', '.join(left)}", soft_wrap=True)
