"""Figures: `sites` and the experiments prepare what is shown (`prepared`), `static` or `interactive` draws it.

Static figures are matplotlib's (png, svg, pdf), interactive ones plotly's (an HTML file, a notebook). Both draw the
same `Picture`, so that what a figure says can be checked without a picture being looked at.
"""

from __future__ import annotations

from typing import Any

from nsp.errors import InputError
from nsp.report.figures.prepared import Picture


def draw(picture: Picture, *, interactive: bool = False) -> Any:
    """A picture as a matplotlib Figure, or (interactive) as a plotly Figure.

    Raises:
        InputError: interactive, and plotly is not installed.
    """
    if not interactive:
        from nsp.report.figures.static import figure

        return figure(picture)
    try:
        from nsp.report.figures import interactive as module
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise InputError("interactive figures need plotly, which is not installed: pip install 'nsp[plotly]'") from None
    return module.figure(picture)
