"""What the commands share: consoles, the exit codes, rendering of summaries, opening of stores.

Results go to stdout, everything else to stderr. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsp.errors import InputError, NspError

if TYPE_CHECKING:
    import xarray as xr

    from nsp.recipe import Recipe
    from nsp.report.summary import Summary, SummaryTable

EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130
_PIPE_WIDTH = 200  # a pipe has no width; tables take what they need up to this


class RunInterruptedError(Exception):
    """Ctrl-C, with what the user should know about it."""


def stdout() -> Console:
    """A console for results."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def stderr() -> Console:
    """A console for messages, progress and errors."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def note(message: str) -> None:
    """One line about what goes on, to stderr."""
    stderr().print(Text(message), soft_wrap=True)


def report_error(error: BaseException, *, debug: bool = False) -> int:
    """Print an error as one clear message and give its exit code."""
    if debug:
        stderr().print(Text("".join(traceback.format_exception(error)).rstrip()), soft_wrap=True)
    if isinstance(error, NspError):
        message, code = str(error), error.exit_code
    else:
        detail = str(error).strip() or "no further message"
        message = f"{type(error).__name__}: {detail}"
        if not debug:
            message += "\nThis was not foreseen; --debug shows where it happened."
        code = EXIT_FAILED
    stderr().print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    return code


def experiments() -> Mapping[str, Any]:
    """Every experiment by kind. Imports torch and all that."""
    from nsp.experiments import registry

    return registry.EXPERIMENTS


def recipe_kinds() -> Mapping[str, type[Recipe]]:
    """The recipe class of every kind of experiment. Imports no torch."""
    from nsp.experiments import kinds

    return kinds.RECIPES


def open_tree(store: str) -> xr.DataTree:
    """The results in a store, read lazily; its header is the tree's attrs. InputError where there is no store."""
    path = Path(store)
    if "://" not in store:
        if not path.exists():
            raise InputError(f"no such store: {store}{_stores_near(path)}")
        if path.is_dir() and not (path / "zarr.json").is_file():
            raise InputError(f"{store} is no store of results (it has no zarr.json){_stores_near(path / 'x')}")
    from nsp.stores import open_run

    return open_run(store).tree


def render_summary(console: Console, summary: Summary) -> None:
    """Print a summary: a title, a few lines, its tables."""
    console.print(Text(summary.title, style="bold"), soft_wrap=True)
    for line in summary.lines:
        console.print(Text(line), soft_wrap=True)
    for table in summary.tables:
        console.print(_table(table))


def _table(data: SummaryTable) -> Table:
    table = Table(title=data.title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(data.columns):
        cells = [row[index] for row in data.rows]
        number = bool(cells) and all(_is_number(cell) for cell in cells)
        table.add_column(Text(name), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in data.rows:
        table.add_row(*(Text(cell_text(cell)) for cell in row))
    return table


def cell_text(cell: Any) -> str:
    """A table cell as text on one line: three decimals for a fraction, control characters escaped."""
    if isinstance(cell, bool) or cell is None:
        return "-" if cell is None else str(cell)
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(cell))


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _stores_near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    stores = sorted(str(found.parent) for found in path.parent.glob("*/zarr.json"))
    return f"; there are {', '.join(stores[:8])}" if stores else ""
