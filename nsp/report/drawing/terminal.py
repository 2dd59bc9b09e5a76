"""Panels drawn in a terminal, with characters that carry the values; colour, where there is some, repeats them.

A heatmap takes two characters a cell. fig.Lines, bars and clouds become such grids; distributions, graphs and tables are
tables.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.style import Style
from rich.table import Table as Rows
from rich.text import Text

from nsp.report import figures as fig
from nsp.report.labels import cell_text, short

_MOST_ROWS = 48
_MOST_EDGES = 30
_BINS = (20, 12)  # of a cloud, along x and y
_STEPS = 9
_MISSING, _ZERO = " /", " ."
# From blue (negative) over white to red, as in the figures: the ends of matplotlib's RdBu, softened to be written on.
_NEGATIVE, _POSITIVE = (67, 147, 195), (214, 96, 77)


def draw_text(panel: fig.Panel, title: str, width: int, encoding: str = "utf-8") -> RenderableType:
    """A panel in at most `width` columns; characters of tokens that `encoding` does not have are escaped."""
    if isinstance(panel, fig.Grid):
        return text_grid(panel, title, width, encoding)
    if isinstance(panel, fig.Scatter):
        return text_grid(_density(panel), title, width, encoding)
    if isinstance(panel, fig.Chart):
        return text_grid(_series_grid(panel), title, width, encoding)
    if isinstance(panel, fig.Distribution):
        return _table(title, (panel.y, "series", "n", "5 %", "25 %", "median", "75 %", "95 %"), _distribution_rows(panel), encoding)
    if isinstance(panel, fig.Graph):
        edges = sorted(panel.edges, key=lambda edge: -abs(edge.weight))
        rows = tuple((edge.source, edge.target, edge.weight) for edge in edges[:_MOST_EDGES])
        more = f" (the {_MOST_EDGES} strongest of {len(edges)} edges)" if len(edges) > _MOST_EDGES else ""
        return _table(title + more, ("from", "to", panel.quantity), rows, encoding)
    if isinstance(panel, fig.Table):
        return _table(title, panel.columns, panel.rows, encoding)
    raise TypeError(f"{type(panel).__name__} is no panel")


def text_grid(grid: fig.Grid, title: str, width: int, encoding: str = "utf-8") -> Text:
    """A heatmap in at most `width` columns, the first row of the grid at the bottom.

    A cell is a digit, the ninths of the scale that its value has (rounded), with - before it where it is negative; `.`
    rounds to none, `/` has no value. What does not fit is folded: a cell then has its neighbours' strongest value.
    """
    names = [_encodable(short(name, width // 3), encoding) for name in grid.rows]
    side = max(map(len, (*names, grid.y))) + 1
    fit = max(1, (width - side) // 2)
    by_column, by_row = math.ceil(grid.values.shape[1] / fit), math.ceil(grid.values.shape[0] / _MOST_ROWS)
    centre, reach = _centre_and_reach(grid.scale)
    values = _folded(_folded(grid.values, by_column, centre).T, by_row, centre).T
    text = Text(_encodable(title, encoding) + "\n")
    for row in range(values.shape[0] - 1, -1, -1):
        text.append(names[row * by_row].rjust(side - 1) + " ")
        for value in values[row]:
            text.append(*_cell(value, centre, reach))
        text.append("\n")
    places = [_place(label, at) for at, label in enumerate(grid.columns)][::by_column]
    text.append(grid.y.rjust(side - 1)[: side - 1] + " " + _ruler(places) + f"\n{grid.x}")
    if any(label != _place(label, at) for at, label in enumerate(grid.columns)):
        named = ((_place(label, at), label) for at, label in enumerate(grid.columns))
        text.append(_encodable("s: " + ", ".join(f"{at} {label.removesuffix(f' {at}')}" for at, label in named), encoding))
    folds = [f"{by_column} {grid.x}s"] * (by_column > 1) + [f"{by_row} {grid.y}s"] * (by_row > 1)
    said = f"\n{_STEPS} is {reach:.3g}" + (f" from {centre:.3g}" if centre else "")
    text.append(said + ", - below, . about none, / no value")
    text.append(f"; a cell is the strongest of {' and '.join(folds)}" if folds else "")
    return text


def _centre_and_reach(scale: fig.Scale) -> tuple[float, float]:
    centre = scale.low if scale.centre is None else scale.centre
    return centre, (scale.high - centre) or 1.0


def _series_grid(chart: fig.Chart) -> fig.Grid:
    """The series of a chart as rows over their x, the first on top."""
    places = np.unique(np.concatenate([one.x for one in chart.series])) if chart.series else np.array([])
    values = np.full((len(chart.series), len(places)), np.nan)
    for row, one in enumerate(reversed(chart.series)):
        values[row, np.searchsorted(places, one.x)] = one.y
    labels = [chart.ticks[int(at)] for at in places] if isinstance(chart, fig.Bars) else [f"{at:g}" for at in places]
    names = tuple(one.name for one in reversed(chart.series))
    return fig.Grid(values=values, rows=names, columns=tuple(labels), y="", x=chart.x, scale=fig.diverging(values))


def _density(chart: fig.Scatter) -> fig.Grid:
    """How many points lie where, as a share of the fullest place."""
    x, y = (np.concatenate([getattr(one, axis) for one in chart.series] or [[]]) for axis in ("x", "y"))
    there = np.isfinite(x) & np.isfinite(y)
    counts, x_ends, y_ends = np.histogram2d(x[there], y[there], bins=_BINS)
    rows, columns = ([f"{(low + high) / 2:.3g}" for low, high in pairwise(ends)] for ends in (y_ends, x_ends))
    scale = fig.Scale(0.0, max(1.0, float(counts.max())), None)
    return fig.Grid(values=counts.T, rows=tuple(rows), columns=tuple(columns), y=chart.y, x=chart.x, scale=scale)


def _distribution_rows(panel: fig.Distribution) -> tuple[tuple[object, ...], ...]:
    rows: list[tuple[object, ...]] = []
    for at, group in enumerate(panel.groups):
        for name, groups in zip(panel.series, panel.values, strict=True):
            values = groups[at][np.isfinite(groups[at])]
            rows.append((group, name, values.size, *(fig.five_numbers(values) if values.size else (None,) * 5)))
    return tuple(rows)


def _table(title: str, columns: tuple[str, ...], rows: tuple[tuple[object, ...], ...], encoding: str) -> Rows:
    table = Rows(title=Text(_encodable(title, encoding)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[at], int | float) for row in rows)
        table.add_column(Text(_encodable(name, encoding)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_encodable(cell_text(cell), encoding)) for cell in row))
    return table


def _folded(values: np.ndarray, by: int, centre: float) -> np.ndarray:
    """Every `by` columns as one, their value farthest from the centre."""
    if by == 1:
        return values
    height, width = values.shape
    padded = np.full((height, math.ceil(width / by) * by), np.nan)
    padded[:, :width] = values
    blocks = padded.reshape(height, -1, by)
    best = np.nan_to_num(np.abs(blocks - centre), nan=-1.0).argmax(axis=2)
    folded: np.ndarray = np.take_along_axis(blocks, best[..., None], axis=2)[..., 0]
    return folded


def _cell(value: float, centre: float, reach: float) -> tuple[str, Style | str]:
    if not math.isfinite(value):
        return _MISSING, "dim"
    share = max(-1.0, min(1.0, (value - centre) / reach))
    digit = round(abs(share) * _STEPS)
    if digit == 0:
        return _ZERO, ""
    end = _POSITIVE if share > 0 else _NEGATIVE
    red, green, blue = (round(255 + (part - 255) * abs(share)) for part in end)
    return f"{'-' if share < 0 else ' '}{digit}", Style(color="black", bgcolor=f"rgb({red},{green},{blue})")


def _place(label: str, at: int) -> str:
    """The number of a column: a position's, a head's."""
    number = label.rpartition(" ")[2]
    return number if number.lstrip("-").isdecimal() else str(at)


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("␣", "_").encode(encoding, "backslashreplace").decode(encoding)
    return text


def _ruler(places: list[str]) -> str:
    """Column numbers below the cells, as many as have room."""
    longest = max(map(len, places), default=1)
    step = math.ceil((longest + 1) / 2)
    ruler = "".join(place.rjust(2) + " " * (2 * step - max(2, len(place))) for place in places[::step])
    return ruler[: 2 * len(places)] if step == 1 else ruler.rstrip()
