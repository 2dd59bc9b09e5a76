"""The vocabulary of figures: frozen values that matplotlib, plotly, the report's page and the terminal all draw.

A `Figure` is what a run shows under one name. It has views (the mean over pairs, each pair, each method), of which one
is shown at a time; a view makes its `Panel` when it is first looked at. A panel is a grid, bars, lines, a scatter, a
distribution, a graph or a table. Numbers are float64 and NaN where there is none. Scales, labels, what is missing and
what is shown first are decided here and by whoever makes the panel, never where it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from nsp.report.labels import quoted_value

MISSING = "no value"
LONGEST_LABEL, LONGEST_CELL = 16, 9  # characters of a column's label, and of what is written in a cell

Which = int | Literal["mean"]


@dataclass(frozen=True)
class Scale:
    """How values become colours: from `low` to `high`, diverging around `centre`, or (None) in one direction."""

    low: float
    high: float
    centre: float | None = 0.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Panel:
    """What all panels say of themselves.

    Attributes:
        meaning: what a value is; ``units`` its units, "" for a number without.
        remark: over how many pairs, prompts or units, and what was chosen or left out.
        finding: a sentence with the panel's main number; None: its largest value, "": none.
    """

    meaning: str = ""
    units: str = ""
    remark: str = ""
    finding: str | None = None

    @property
    def quantity(self) -> str:
        """The meaning with its units, for an axis or a colour bar."""
        return f"{self.meaning} [{self.units}]" if self.units else self.meaning


@dataclass(frozen=True, eq=False, kw_only=True)
class Grid(Panel):
    """A heatmap.

    Attributes:
        values: (row, column); ``low`` and ``high`` the ends of a 95 % interval, where there is one.
        rows, columns: labels, the first row at the bottom; a position's is ``<token> <position>``.
        y, x: what rows and columns are; y is "" for a single row.
        texts: what is written in each cell, (row, column) of str; None for nothing.
        details: what else is said of each cell, (row, column) of float or str, by a name.
    """

    values: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    y: str
    x: str
    scale: Scale
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    texts: np.ndarray | None = None
    details: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """One line, cloud of points or row of bars.

    Attributes:
        x, y: one number for each point; ``low`` and ``high`` the ends of y's interval, where there is one.
        notes: what each point is, in place of its x; "; " begins a further line.
        aside: a control, drawn in grey.
    """

    name: str = ""
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    aside: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Chart(Panel):
    """Series over one axis.

    Attributes:
        x, y: what the axes are, in a word or two; ``meaning`` and ``units`` are of y, ``x_meaning`` says more of x.
        levels: values of y that are marked.
        whole: x is a whole number, such as a layer.
    """

    series: tuple[Series, ...]
    x: str
    y: str
    x_meaning: str = ""
    levels: tuple[float, ...] = ()
    log_x: bool = False
    log_y: bool = False
    whole: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Lines(Chart):
    """Lines, each perhaps with a band."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scatter(Chart):
    """Clouds of points; ``equality`` draws the line on which x equals y. ``x_told``: x is told of a point beside y."""

    equality: bool = False
    x_told: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Bars(Chart):
    """Bars side by side; x counts the labels in `ticks` from 0."""

    ticks: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Distribution(Panel):
    """For each group (a row) and each series (a colour) the values themselves, with their quartiles.

    Attributes:
        values: by series, then by group; ``notes`` what each value is, likewise.
        level: a value that is marked.
    """

    groups: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[np.ndarray, ...], ...]
    y: str
    notes: tuple[tuple[tuple[str, ...], ...], ...] = ()
    level: float = 0.0


@dataclass(frozen=True)
class Node:
    """A node of a graph: its name, its place, its value (NaN: none), and what else is said of it."""

    name: str
    x: float
    y: float
    value: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class Edge:
    """An edge between two nodes by their names; its weight gives width and colour."""

    source: str
    target: str
    weight: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Graph(Panel):
    """Nodes at places such as a layer and a position, and weighted edges; ``meaning`` and ``units`` are of the weights."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    x: str
    y: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Panel):
    """Rows of texts and numbers under column names."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """One state of a figure: `make` gives its panel; the other attributes are how it is chosen.

    ``make`` of a heatmap takes ``units`` and ``base`` (see `nsp.report.site_panels.heatmap`).
    """

    make: Callable[..., Panel]
    name: str = ""
    component: str = ""
    metric: str = ""
    item: Which | None = None

    @cached_property
    def panel(self) -> Panel:
        """The panel, made once."""
        return self.make()


@dataclass(frozen=True, eq=False, kw_only=True)
class Figure:
    """What a run shows under one name.

    Attributes:
        what: the name by which it is chosen (`nsp plot --what`); several figures with one name are drawn together.
        title: its heading.
        views: at least one; the first is shown first.
        abreast: how many of its views a picture that cannot be changed shows side by side.
        in_report: whether the report shows it too; False where another figure of the report has the same numbers.
        no_mean: why there is no view of the mean over pairs or prompts, for the error that says so.
    """

    what: str
    title: str
    views: tuple[View, ...]
    abreast: int = 1
    in_report: bool = True
    no_mean: str = "it has no mean over pairs or prompts"

    @property
    def finding(self) -> str:
        """A sentence on what the first view shows."""
        first = self.views[0]
        if first.panel.finding is not None:
            return first.panel.finding
        best = _largest(first.panel)
        return f"{self.title}: {best}{f' ({first.name})' if first.name else ''}" if best else ""


@dataclass(frozen=True, eq=False)
class Picture:
    """Panels under one title, each with its heading, as a file or a notebook holds them."""

    title: str
    panels: tuple[tuple[str, Panel], ...]
    columns: int = 1


def figure(what: str, title: str, *views: View | Callable[..., Panel], **options: Any) -> Figure:
    """A figure from its views, or from functions that make their panels."""
    given = tuple(view if isinstance(view, View) else View(make=view) for view in views)
    return Figure(what=what, title=title, views=given, **options)


def has_missing(panel: Panel) -> bool:
    """Whether a cell or a bar has no value."""
    if isinstance(panel, Grid):
        return not bool(np.isfinite(panel.values).all())
    return isinstance(panel, Bars) and any(not np.isfinite(one.y).all() for one in panel.series)


def same_scale(panels: Iterable[Panel]) -> list[Panel]:
    """Grids of one quantity with one centre get one scale, wide enough for all of them."""
    panels = list(panels)
    scales: dict[tuple[str, float | None], Scale] = {}
    for grid in (panel for panel in panels if isinstance(panel, Grid)):
        key = (grid.quantity, grid.scale.centre)
        known = scales.setdefault(key, grid.scale)
        scales[key] = Scale(min(known.low, grid.scale.low), max(known.high, grid.scale.high), grid.scale.centre)
    return [
        replace(panel, scale=scales[panel.quantity, panel.scale.centre]) if isinstance(panel, Grid) else panel
        for panel in panels
    ]


def diverging(values: np.ndarray, centre: float = 0.0) -> Scale:
    """Equally far on both sides of `centre`, up to the value farthest from it; 1 where there is none."""
    finite = np.abs(values[np.isfinite(values)] - centre)
    reach = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    return Scale(centre - reach, centre + reach, centre)


SHARE = Scale(0.0, 1.0, None)  # of a probability or a share


def five_numbers(values: np.ndarray) -> tuple[float, float, float, float, float]:
    """Percentiles 5, 25, 50, 75 and 95 of some values, interpolated linearly; NaN is left out."""
    low, first, median, third, high = (float(end) for end in np.nanpercentile(values, [5, 25, 50, 75, 95]))
    return low, first, median, third, high


def graph_reach(graph: Graph) -> float:
    """The largest size of an edge's weight, 1 where there is none: what width and colour are relative to."""
    return max((abs(edge.weight) for edge in graph.edges if math.isfinite(edge.weight)), default=0.0) or 1.0


def grid_lines(grid: Grid, row: int, column: int) -> list[str]:
    """What is told of a cell besides its value: where it is first, then its interval and its details."""
    place = f"{grid.y} {grid.rows[row]}, " if grid.y else ""
    lines = [f"{place}{grid.x} {grid.columns[column]}", number(float(grid.values[row, column]))]
    if grid.low is not None and grid.high is not None:
        lines.append(interval(float(grid.low[row, column]), float(grid.high[row, column])))
    for name, part in grid.details.items():
        if (said := quoted_value(part[row, column])) is not None:
            lines.append(f"{name} {said}")
    return [line for line in lines if line]


def number(value: float) -> str:
    """A number of four digits."""
    return f"{value:.4g}" if math.isfinite(value) else MISSING


def interval(low: float, high: float) -> str:
    """An interval in words; "" where there is none."""
    return f"interval {low:.4g} to {high:.4g}" if math.isfinite(low) and math.isfinite(high) else ""


def with_interval(value: float, low: float = math.nan, high: float = math.nan, units: str = "") -> str:
    """A number for a sentence, with its interval where there is one."""
    ends = f" [{low:.3g}, {high:.3g}]" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{value:.3g}{ends}{' ' + units if units else ''}" if math.isfinite(value) else MISSING


_FOLDED = ("position", "head", "neuron", "component", "direction")  # details of a grid that say where a cell's value is


def _largest(panel: Panel) -> str:
    """Where the value farthest from zero is, and how large it is."""
    if isinstance(panel, Grid):
        return _strongest_cell(panel)
    if not isinstance(panel, Chart):
        return ""
    best: tuple[float, str] = (-1.0, "")
    for one in panel.series:
        size = np.nan_to_num(np.abs(one.y), nan=-1.0)
        if not size.size or size.max() <= best[0]:
            continue
        at = int(size.argmax())
        low, high = (math.nan if end is None else float(end[at]) for end in (one.low, one.high))
        ticks = panel.ticks if isinstance(panel, Bars) else ()
        place = f"{panel.x} {ticks[int(one.x[at])] if ticks else f'{one.x[at]:g}'}"
        place = one.notes[at].partition("; ")[0] if one.notes else place
        place = f"{one.name}, {place}" if len(panel.series) > 1 else place
        best = float(size[at]), f"largest at {place}: {with_interval(float(one.y[at]), low, high, panel.units)}"
    return best[1]


def _strongest_cell(grid: Grid) -> str:
    size = np.nan_to_num(np.abs(grid.values), nan=-1.0)
    if not size.size or size.max() <= 0:
        return ""
    row, column = (int(at) for at in np.unravel_index(int(size.argmax()), size.shape))
    low, high = (math.nan if end is None else float(end[row, column]) for end in (grid.low, grid.high))
    parts: Sequence[str] = [f"{grid.y} {grid.rows[row]}" if grid.y else "", f"{grid.x} {grid.columns[column]}"]
    parts = [*parts, *(f"{dim} {grid.details[dim][row, column]:g}" for dim in _FOLDED if dim in grid.details)]
    said = with_interval(float(grid.values[row, column]), low, high, grid.units)
    return f"strongest at {', '.join(part for part in parts if part)}: {said}"
