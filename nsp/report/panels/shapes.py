"""The shapes of a report's figures. Plain data, so that the page (and a test) can check a figure against the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

Cell = float | str | None
Cells = Sequence[Sequence[Cell]]  # by row and column
Grid = Sequence[Sequence[float | None]]
Form = Literal["line", "points", "bars"]


@dataclass(frozen=True)
class Layer:
    """One grid of a panel: its name, values by row and column, and what is shown beside each cell.

    Attributes:
        low, high: ends of a 95 % interval.
        details: what else is said of each cell, by name.
        columns: its own column labels, where they differ from the panel's (each prompt has its tokens).
    """

    name: str
    values: Grid
    low: Grid | None = None
    high: Grid | None = None
    details: Mapping[str, Cells] = field(default_factory=dict)
    columns: list[str] | None = None


@dataclass(frozen=True)
class Panel:
    """A heatmap: what it shows, its labels, and one or more layers of values.

    Attributes:
        written: the detail that is written into the cells; "" for none.
        finding: a sentence on what it shows, with its number.
    """

    title: str
    variable: str
    meaning: str
    units: str
    y: str
    x: str
    rows: list[str]
    columns: list[str]
    centre: float
    reach: float
    layers: list[Layer]
    note: str = ""
    written: str = ""
    finding: str = ""


@dataclass(frozen=True)
class Series:
    """One line, cloud of points or row of bars: ``y`` over ``x``, perhaps with an interval, and what each point is."""

    name: str
    x: list[float]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    labels: list[str] | None = None
    form: Form = "line"


@dataclass(frozen=True)
class View:
    """What a chart shows at a time: a name in its menu, and series."""

    name: str
    series: list[Series]


@dataclass(frozen=True)
class Chart:
    """Lines, points or bars over one axis.

    Attributes:
        y, x: what the axes are; ``units`` is of y.
        ticks: names along x, for x = 0, 1, ...; None where x is a number.
        equality: draws the line on which y equals x.
        logarithmic: of x.
        whole: x is a whole number, such as a layer.
        tell_x: a point tells its x too, where that is a quantity of its own.
    """

    title: str
    meaning: str
    units: str
    y: str
    x: str
    views: list[View]
    ticks: list[str] | None = None
    equality: bool = False
    logarithmic: bool = False
    whole: bool = False
    tell_x: bool = False
    note: str = ""
    finding: str = ""


Drawing = Panel | Chart


def same_scale(runs: Sequence[Sequence[Drawing]]) -> list[list[Drawing]]:
    """Heatmaps of one variable in the same units get one scale, within a run and across runs."""
    reach: dict[tuple[str, str], float] = {}
    for panel in (panel for panels in runs for panel in panels if isinstance(panel, Panel)):
        key = (panel.variable, panel.units)
        reach[key] = max(reach.get(key, 0.0), panel.reach)
    return [
        [replace(one, reach=reach[one.variable, one.units]) if isinstance(one, Panel) else one for one in panels]
        for panels in runs
    ]


def rounded(value: Any) -> float | None:
    """A number of four digits; None where there is none."""
    number = float(value)
    return float(f"{number:.4g}") if np.isfinite(number) else None


def numbers(values: Any) -> list[float | None]:
    """A row of numbers of four digits; None where there is none."""
    return [rounded(value) for value in np.asarray(values, dtype=np.float64).reshape(-1)]


def said(value: float | None, low: float | None = None, high: float | None = None, units: str = "") -> str:
    """A number for a sentence, with its interval where there is one."""
    if value is None:
        return "no value"
    ends = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
    return f"{value:.3g}{ends}{' ' + units if units else ''}"
