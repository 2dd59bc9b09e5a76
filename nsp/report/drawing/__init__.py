"""What draws figures: matplotlib (a file, a notebook), plotly (to point at), the report's page, and the terminal.

Each draws the same panels of `nsp.report.figures`, so that what a figure says can be checked without a picture being
looked at. Nothing of matplotlib or plotly is imported before something is drawn with it.
"""

from __future__ import annotations

from typing import Any

from nsp.errors import InputError
from nsp.report.figures import Picture

# Okabe and Ito's colours; lines differ in their markers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(picture: Picture, *, interactive: bool = False) -> Any:
    """A picture as a matplotlib Figure, or (interactive) as a plotly Figure.

    Raises:
        InputError: interactive, and plotly is not installed.
    """
    if not interactive:
        from nsp.report.drawing import matplotlib

        return matplotlib.figure(picture)
    try:
        from nsp.report.drawing import plotly
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise InputError("interactive figures need plotly, which is not installed: pip install 'nsp[plotly]'") from None
    return plotly.figure(picture)
