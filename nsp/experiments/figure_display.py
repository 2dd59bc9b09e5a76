"""Showing a figure that a Python caller asked for: in a notebook, in a window, or in a file."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_place(plot: bool | str | Path) -> None:
    """InputError where a figure is asked for and there is no place to show it; said before anything runs."""
    if plot is True and not _in_notebook():
        import matplotlib

        if matplotlib.get_backend().lower() in ("agg", "cairo", "pdf", "ps", "svg", "template"):
            raise InputError("plot=True needs a notebook or a display to show a figure; give a file: plot='figure.png'")
    if isinstance(plot, str | Path) and Path(plot).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"plot: {plot} does not end in .png, .pdf or .svg")


def show(figure: Figure, plot: bool | str | Path) -> None:
    """Write the figure to a file, or show it in the notebook, or in a window until that is closed."""
    if isinstance(plot, str | Path):
        figure.savefig(plot)
    elif _in_notebook():
        display = importlib.import_module("IPython.display")  # no dependency: it is there where a notebook runs
        display.display(figure)
    else:
        import matplotlib.pyplot as plt

        manager: Any = plt.figure().canvas.manager
        manager.canvas.figure = figure
        figure.set_canvas(manager.canvas)
        plt.show()


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None
