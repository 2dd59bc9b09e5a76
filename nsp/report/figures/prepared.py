"""What a figure shows, as plain data: panels of labelled numbers, which `static` and `interactive` draw alike.

A `Picture` is one or more panels. Numbers are float64, NaN where there is none. Whatever stands on an axis says what it
is and in which units; what a value was averaged over, and how many there were, is in the panel's remark.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

MISSING = "no value"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
LONGEST_LABEL, LONGEST_CELL = 16, 9  # characters of a column's label, and of what is written in a cell
_BEFORE_PLACE = "  "  # between a token and its position in a column's label


@dataclass(frozen=True)
class Scale:
    """How values become colours: from `low` to `high`, diverging around `centre`, or (None) in one direction."""

    low: float
    high: float
    centre: float | None = 0.0


@dataclass(frozen=True, eq=False)
class Grid:
    """A heatmap.

    Attributes:
        values: (row, column); ``low`` and ``high`` their interval, where there is one.
        rows, columns: labels, the first row at the bottom; a position's is ``<token>  <position>``.
        y, x: what rows and columns are; y is "" for a single row.
        meaning: what a value is, with its units.
        texts: what is written in each cell, (row, column) of str; None for nothing.
        details: what else is said of each cell, (row, column) of str, by a name.
    """

    remark: str
    values: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    y: str
    x: str
    meaning: str
    scale: Scale
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    texts: np.ndarray | None = None
    details: dict[str, np.ndarray] | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class Bars:
    """A bar a label, with an interval where `low` and `high` are numbers; `notes` says of what each bar is."""

    remark: str
    labels: tuple[str, ...]
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    notes: tuple[str, ...]
    x: str
    meaning: str
    name: str = ""


@dataclass(frozen=True, eq=False)
class Scatter:
    """Points, and the line on which both are equal; `places` says of which layer, head, ... each point is."""

    remark: str
    x: np.ndarray
    y: np.ndarray
    places: dict[str, np.ndarray]
    x_meaning: str
    y_meaning: str
    name: str = ""


@dataclass(frozen=True, eq=False)
class Curve:
    """One line; `low` and `high` bound a band about it. ``aside``: a control, drawn in grey."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    aside: bool = False


@dataclass(frozen=True, eq=False)
class Curves:
    """Lines over one axis; `levels` are values of y to be marked."""

    remark: str
    curves: tuple[Curve, ...]
    x: str
    meaning: str
    levels: tuple[float, ...] = ()
    log_x: bool = False
    log_y: bool = False
    name: str = ""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Distributions: for each group (a row) and each series (a colour) the values themselves.

    Attributes:
        values: by series, then by group.
        level: a value of x to be marked.
    """

    remark: str
    groups: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[np.ndarray, ...], ...]
    y: str
    meaning: str
    level: float = 0.0
    name: str = ""


@dataclass(frozen=True)
class Box:
    """Five numbers of a distribution: percentiles 5, 25, 50, 75 and 95."""

    low: float
    first: float
    median: float
    third: float
    high: float


def box(values: np.ndarray) -> Box:
    """The five numbers of some values, interpolated linearly; NaN is left out."""
    return Box(*(float(one) for one in np.nanpercentile(values, [5, 25, 50, 75, 95])))


Panel = Grid | Bars | Scatter | Curves | Boxes


@dataclass(frozen=True, eq=False)
class Picture:
    """One figure: a title, panels, and how many stand side by side."""

    title: str
    panels: tuple[Panel, ...]
    columns: int = 1


def has_missing(panel: Panel) -> bool:
    """Whether a cell or a bar has no value."""
    return isinstance(panel, Grid | Bars) and not bool(np.isfinite(panel.values).all())


def stacked(title: str, panels: dict[str, Panel], columns: int = 1) -> Picture:
    """Panels under one title, each with its name where there are several; grids of one quantity get one scale."""
    if len(panels) == 1:
        return Picture(title, tuple(panels.values()))
    named = [replace(panel, name=name) for name, panel in panels.items()]
    return Picture(title, same_scale(named), columns)


def same_scale(panels: list[Panel]) -> tuple[Panel, ...]:
    """Grids of one quantity with one centre get one scale, wide enough for all of them."""
    grids = [panel for panel in panels if isinstance(panel, Grid)]
    keys = {(grid.meaning, grid.scale.centre) for grid in grids}
    scales = {}
    for meaning, centre in keys:
        those = [grid.scale for grid in grids if (grid.meaning, grid.scale.centre) == (meaning, centre)]
        scales[meaning, centre] = Scale(min(one.low for one in those), max(one.high for one in those), centre)
    return tuple(
        replace(panel, scale=scales[panel.meaning, panel.scale.centre]) if isinstance(panel, Grid) else panel
        for panel in panels
    )


def diverging(values: np.ndarray, centre: float = 0.0) -> Scale:
    """Equally far on both sides of `centre`, up to the value farthest from it; 1 where there is none."""
    finite = np.abs(values[np.isfinite(values)] - centre)
    reach = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    return Scale(centre - reach, centre + reach, centre)


def meaning(values: xr.DataArray, name: str) -> str:
    """What a number is, with its units, for a label."""
    said, units = str(values.attrs.get("long_name", name)), values.attrs.get("units")
    return said if units in (None, "", "1") else f"{said} [{units}]"


def token_label(text: str, place: object) -> str:
    """A column's label: the token, then its position; "" for a position without a token."""
    return f"{visible(text)}{_BEFORE_PLACE}{place}" if text else ""


def visible(text: str) -> str:
    """A token with its spaces shown and its control characters escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text.replace(" ", "␣")
    )


def shortened(label: str, longest: int) -> str:
    """A label whose text is at most `longest` characters; a position behind it stays."""
    text, between, place = label.rpartition(_BEFORE_PLACE)
    if not between:
        text, place = label, ""
    return (text if len(text) <= longest else text[: longest - 1] + "…") + between + place
