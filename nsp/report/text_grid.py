"""A heatmap for a terminal: two characters a cell, which carry the value; colour, where there is some, repeats it."""

from __future__ import annotations

import math

import numpy as np
from rich.style import Style
from rich.text import Text

from nsp.report.figures.prepared import Grid

_MOST_ROWS = 48
_STEPS = 9
_MISSING, _ZERO = " /", " ."
# From blue (negative) over white to red, as in the figures: the ends of matplotlib's RdBu, softened to be written on.
_NEGATIVE, _POSITIVE = (67, 147, 195), (214, 96, 77)


def text_grid(grid: Grid, title: str, width: int, encoding: str = "utf-8") -> Text:
    """A heatmap in at most `width` columns, the first row of the grid at the bottom.

    A cell is a digit, the ninths of the scale that its value has (rounded), with - before it where it is negative; `.`
    rounds to none, `/` has no value. What does not fit is folded: a cell then stands for its neighbours' strongest.
    Characters of tokens that `encoding` does not have are escaped.
    """
    side = max(map(len, (*grid.rows, grid.y))) + 1
    fit = max(1, (width - side) // 2)
    by_column, by_row = math.ceil(grid.values.shape[1] / fit), math.ceil(grid.values.shape[0] / _MOST_ROWS)
    centre, reach = grid.scale.centre or 0.0, grid.scale.high - (grid.scale.centre or 0.0)
    values = _folded(_folded(grid.values, by_column, centre).T, by_row, centre).T
    text = Text(_encodable(title, encoding) + "\n")
    for row in range(values.shape[0] - 1, -1, -1):
        text.append(grid.rows[row * by_row].rjust(side - 1) + " ")
        for value in values[row]:
            text.append(*_cell(value, centre, reach))
        text.append("\n")
    places = [_place(label, index) for index, label in enumerate(grid.columns)][::by_column]
    text.append(grid.y.rjust(side - 1)[: side - 1] + " " + _ruler(places) + f"\n{grid.x}")
    if any(label != _place(label, index) for index, label in enumerate(grid.columns)):
        named = (
            f"{_place(label, index)} {label.rpartition('  ')[0] or label}" for index, label in enumerate(grid.columns)
        )
        text.append(_encodable("s: " + ", ".join(named), encoding))
    folds = [f"{by_column} {grid.x}s"] * (by_column > 1) + [f"{by_row} {grid.y}s"] * (by_row > 1)
    said = f"\n{_STEPS} is {reach:.3g}" + (f" from {centre:.3g}" if centre else "")
    text.append(said + ", - below, . about none, / no value")
    text.append(f"; a cell is the strongest of {' and '.join(folds)}" if folds else "")
    return text


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


def _place(label: str, index: int) -> str:
    """The number of a column: a position's, a head's."""
    number = label.rpartition("  ")[2]
    return number if number.lstrip("-").isdecimal() else str(index)


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("␣", "_").encode(encoding, "backslashreplace").decode(encoding)
    return text


def _ruler(places: list[str]) -> str:
    """Column numbers below the cells, as many as have room."""
    longest = max(map(len, places))
    step = math.ceil((longest + 1) / 2)
    ruler = "".join(place.rjust(2) + " " * (2 * step - max(2, len(place))) for place in places[::step])
    return ruler[: 2 * len(places)] if step == 1 else ruler.rstrip()
