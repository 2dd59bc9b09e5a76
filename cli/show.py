"""`nsp show`: a store's summary again, with small heatmaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nsp.cli.backends import jobs_line
from nsp.cli.console import open_tree, render_summary, stdout

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console

_MOST_FIGURES = 4


def show(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store that nsp run wrote.")],
    what: Annotated[
        str | None, typer.Option(help="Draw this figure in place of the heatmaps; its name as for nsp plot --what.")
    ] = None,
) -> None:
    """Show a run again: its findings, and small heatmaps of its effects."""
    tree = open_tree(store)
    from nsp.experiments import finished

    console = stdout()
    render_summary(console, finished.summary(tree, store))
    if line := jobs_line(tree.attrs):
        console.print(line, soft_wrap=True)
    _figures(console, tree, what)
    console.print(f"results: {store}", soft_wrap=True)


def _figures(console: Console, tree: xr.DataTree, what: str | None) -> None:
    """A figure, or the main effects by layer and position, or head; characters carry the values, so that a pipe has them too."""
    from nsp.experiments.run_figures import drawable, picture_of, small_heatmaps
    from nsp.report.drawing.terminal import draw_text

    if what is None:
        panels = small_heatmaps(tree)
    else:
        picture = picture_of(tree, what, drawable(tree, what) or None)
        panels = {name or picture.title: panel for name, panel in picture.panels}
    for name, panel in list(panels.items())[:_MOST_FIGURES]:
        title = ", ".join(part for part in (f"{name}: {panel.quantity}", panel.remark) if part)
        console.print(draw_text(panel, title, console.width, console.encoding))
        console.print()
    if left := list(panels)[_MOST_FIGURES:]:
        console.print(f"nsp plot draws the other components too: {', '.join(left)}", soft_wrap=True)
