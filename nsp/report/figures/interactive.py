"""Pictures drawn by plotly: an HTML file of its own, or a notebook's figure, where pointing at a mark tells its numbers.

The same panels, colours and words as `static`. Importing this module needs plotly (``pip install 'nsp[plotly]'``).
"""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nsp.report.figures.prepared import (
    COLOURS,
    LONGEST_CELL,
    LONGEST_LABEL,
    MISSING,
    Bars,
    Boxes,
    Curves,
    Grid,
    Panel,
    Picture,
    Scale,
    Scatter,
    box,
    has_missing,
    shortened,
)

_DIVERGING = (
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f",
)  # fmt: skip
_SEQUENTIAL = "Cividis"
_GREY = "#d9d9d9"  # what shines through where a grid has no value
_MARKERS = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "x")


def figure(picture: Picture) -> go.Figure:
    """A picture as a plotly Figure."""
    count = len(picture.panels)
    columns = min(picture.columns, count)
    rows = math.ceil(count / columns)
    heights = [max(map(_height, picture.panels[row * columns : (row + 1) * columns])) for row in range(rows)]
    total = sum(heights) + 90
    drawn = make_subplots(
        rows=rows,
        cols=columns,
        row_heights=[height / sum(heights) for height in heights],
        subplot_titles=[_heading(panel, count > 1) for panel in picture.panels],
        vertical_spacing=min(140 / total, 0.9 / max(1, rows - 1)) if rows > 1 else 0,
        horizontal_spacing=0.12 if columns > 1 else 0,
    )
    bars: dict[tuple[str, Scale], str] = {}
    for number, panel in enumerate(picture.panels):
        at = {"row": number // columns + 1, "col": number % columns + 1}
        if isinstance(panel, Grid):
            key = (panel.meaning, panel.scale)
            if key not in bars:
                bars[key] = f"coloraxis{len(bars) + 1}" if bars else "coloraxis"
            _draw_grid(drawn, panel, at, bars[key])
        else:
            _DRAW[type(panel)](drawn, panel, at, number)
    for number, ((said, scale), axis) in enumerate(bars.items()):
        drawn.update_layout({axis: _colour_axis(said, scale, 1.0 + 0.12 * number)})
    drawn.update_layout(
        title={"text": _text(picture.title), "x": 0.01, "xanchor": "left"},
        height=total,
        template="plotly_white",
        margin={"l": 70, "r": 120 if bars else 30, "t": 90, "b": 90},
        legend={"groupclick": "toggleitem", "tracegroupgap": 30},
        font={"size": 12},
    )
    drawn.update_annotations(font_size=12)
    return drawn


def _height(panel: Panel) -> int:
    """Pixels of one panel."""
    if isinstance(panel, Grid):
        return min(max(20 * len(panel.rows) + 180, 320), 2400)
    if isinstance(panel, Boxes):
        return 180 + 34 * len(panel.groups) * len(panel.series)
    return 480 if isinstance(panel, Scatter) else 400


def _heading(panel: Panel, named: bool) -> str:
    parts = [panel.name if named else "", panel.remark, f"grey: {MISSING}" if has_missing(panel) else ""]
    return "<br>".join(map(_text, textwrap.wrap(", ".join(part for part in parts if part), 90 if not named else 60)))


def _draw_grid(drawn: go.Figure, panel: Grid, at: dict[str, int], colours: str) -> None:
    height, width = panel.values.shape
    texts = None
    if panel.texts is not None:
        texts = [[_text(shortened(str(cell), LONGEST_CELL)) for cell in row] for row in panel.texts]
    drawn.add_trace(
        go.Heatmap(
            z=panel.values,
            x=np.arange(width),
            y=np.arange(height),
            customdata=_grid_notes(panel),
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            text=texts,
            texttemplate="%{text}" if texts else None,
            textfont={"size": 9} if texts else None,
            coloraxis=colours,
            xgap=0.5,
            ygap=0.5,
        ),
        **at,
    )
    labels = [_text(shortened(label, LONGEST_LABEL)) for label in panel.columns]
    every = max(1, math.ceil(width / 80))
    ticks = {"tickmode": "array", "showgrid": False, "zeroline": False}
    drawn.update_xaxes(
        title_text=panel.x, tickvals=list(range(0, width, every)), ticktext=labels[::every], range=[-0.5, width - 0.5],
        tickangle=-90 if any(len(label) > 3 for label in labels) else 0, **ticks, **at,
    )  # fmt: skip
    step = max(1, math.ceil(height / 45))
    drawn.update_yaxes(
        title_text=panel.y, tickvals=list(range(0, height, step)), ticktext=[_text(row) for row in panel.rows[::step]],
        range=[-0.5, height - 0.5], **ticks, **at,
    )  # fmt: skip
    # A grey field behind the cells: what has no value is grey, never the colour of zero.
    edges = {"x0": -0.5, "x1": width - 0.5, "y0": -0.5, "y1": height - 0.5}
    drawn.add_shape(type="rect", fillcolor=_GREY, line_width=0, layer="below", **edges, **at)


def _grid_notes(panel: Grid) -> np.ndarray:
    """What is told of each cell: where it is, its value, its interval, and the details it has."""
    notes = np.empty(panel.values.shape, dtype=object)
    for row, column in np.ndindex(notes.shape):
        place = f"{panel.y} {panel.rows[row]}, " if panel.y else ""
        lines = [f"{place}{panel.x} {panel.columns[column]}", _number(float(panel.values[row, column]))]
        if panel.low is not None and panel.high is not None:
            lines.append(_interval(float(panel.low[row, column]), float(panel.high[row, column])))
        lines += [f"{name}: {texts[row, column]}" for name, texts in (panel.details or {}).items()]
        notes[row, column] = "<br>".join(_text(line) for line in lines if line)
    return notes


def _colour_axis(said: str, scale: Scale, place: float) -> dict[str, Any]:
    colours: dict[str, Any]
    if scale.centre is None:
        colours = {"colorscale": _SEQUENTIAL, "cmin": scale.low, "cmax": scale.high}
    else:
        steps = [[number / (len(_DIVERGING) - 1), colour] for number, colour in enumerate(_DIVERGING)]
        colours = {"colorscale": steps, "cmin": scale.low, "cmax": scale.high, "cmid": scale.centre}
    said = "<br>".join(map(_text, textwrap.wrap(said, 48)))
    return {**colours, "colorbar": {"title": {"text": said, "side": "right"}, "x": place, "thickness": 14}}


def _draw_bars(drawn: go.Figure, panel: Bars, at: dict[str, int], number: int) -> None:
    there = np.flatnonzero(np.isfinite(panel.values))
    ends = [np.nan_to_num(end[there]) for end in (panel.high - panel.values, panel.values - panel.low)]
    notes = [
        "<br>".join(
            _text(line)
            for line in (
                f"{panel.x} {panel.labels[place]}" + (f", {panel.notes[place]}" if panel.notes[place] else ""),
                _number(panel.values[place]),
                _interval(panel.low[place], panel.high[place]),
            )
            if line
        )
        for place in there
    ]
    ranged = bool(np.isfinite(panel.low[there]).any())
    drawn.add_trace(
        go.Bar(
            x=there,
            y=panel.values[there],
            customdata=notes,
            hovertemplate="%{customdata}<extra></extra>",
            marker_color=COLOURS[0],
            error_y={"type": "data", "array": ends[0], "arrayminus": ends[1], "color": "#333"} if ranged else None,
            showlegend=False,
        ),
        **at,
    )
    for place in np.flatnonzero(~np.isfinite(panel.values)):
        drawn.add_vrect(x0=place - 0.5, x1=place + 0.5, fillcolor=_GREY, line_width=0, layer="below", **at)
    step = max(1, len(panel.labels) // 30)
    ticks = range(0, len(panel.labels), step)
    drawn.update_xaxes(title_text=panel.x, tickvals=list(ticks), ticktext=panel.labels[::step], tickmode="array", **at)
    drawn.update_yaxes(title_text=_wrapped(panel.meaning), **at)


def _draw_scatter(drawn: go.Figure, panel: Scatter, at: dict[str, int], number: int) -> None:
    both = np.concatenate([panel.x, panel.y])
    ends = [float(both.min()), float(both.max())]
    line = {"color": "#666", "dash": "dash", "width": 1}
    places = ", ".join(f"{dim} %{{customdata[{place}]}}" for place, dim in enumerate(panel.places))
    drawn.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip"), **at)
    drawn.add_trace(
        go.Scattergl(
            x=panel.x,
            y=panel.y,
            mode="markers",
            marker={"size": 4, "opacity": 0.5, "color": COLOURS[0]},
            customdata=np.stack(list(panel.places.values()), axis=1),
            hovertemplate=f"{places}<br>estimate %{{x:.4g}}, exact %{{y:.4g}}<extra></extra>",
            showlegend=False,
        ),
        **at,
    )
    drawn.update_xaxes(title_text=_wrapped(panel.x_meaning), **at)
    drawn.update_yaxes(title_text=_wrapped(panel.y_meaning), **at)


def _draw_curves(drawn: go.Figure, panel: Curves, at: dict[str, int], number: int) -> None:
    place = 0
    for curve in panel.curves:
        colour = "#999999" if curve.aside else COLOURS[place % len(COLOURS)]
        group = f"{number}"
        if curve.low is not None and curve.high is not None:
            there = np.isfinite(curve.low) & np.isfinite(curve.high)
            x = np.concatenate([curve.x[there], curve.x[there][::-1]])
            y = np.concatenate([curve.high[there], curve.low[there][::-1]])
            band = {"fill": "toself", "fillcolor": colour, "opacity": 0.2, "mode": "lines", "line": {"width": 0}}
            drawn.add_trace(go.Scatter(x=x, y=y, hoverinfo="skip", showlegend=False, legendgroup=group, **band), **at)
        notes = [
            _text(f"{_interval(low, high)}")
            for low, high in zip(
                curve.low if curve.low is not None else np.full(len(curve.x), np.nan),
                curve.high if curve.high is not None else np.full(len(curve.x), np.nan),
                strict=True,
            )
        ]
        drawn.add_trace(
            go.Scatter(
                x=curve.x,
                y=curve.y,
                mode="lines+markers",
                name=_text(curve.name),
                line={"color": colour},
                marker={"symbol": _MARKERS[place % len(_MARKERS)], "size": 6},
                customdata=notes,
                hovertemplate="%{x:.4g}: %{y:.4g}<br>%{customdata}<extra>%{fullData.name}</extra>",
                legendgroup=group,
                legendgrouptitle_text=_text(panel.name) if place == 0 and panel.name else None,
                showlegend=len(panel.curves) > 1,
            ),
            **at,
        )
        place += not curve.aside
    for level in panel.levels:
        drawn.add_hline(y=level, line={"color": "#666", "width": 1, "dash": "solid" if level == 0 else "dash"}, **at)
    drawn.update_xaxes(title_text=panel.x, type="log" if panel.log_x else "linear", **at)
    drawn.update_yaxes(title_text=_wrapped(panel.meaning), type="log" if panel.log_y else "linear", **at)


def _draw_boxes(drawn: go.Figure, panel: Boxes, at: dict[str, int], number: int) -> None:
    for place, (name, groups) in enumerate(zip(panel.series, panel.values, strict=True)):
        there = [
            (_text(group), values[np.isfinite(values)])
            for group, values in zip(panel.groups, groups, strict=True)
            if np.isfinite(values).any()
        ]
        fives = [box(values) for _, values in there]
        drawn.add_trace(
            go.Box(
                x=[values.tolist() for _, values in there],
                y=[group for group, _ in there],
                lowerfence=[five.low for five in fives],
                q1=[five.first for five in fives],
                median=[five.median for five in fives],
                q3=[five.third for five in fives],
                upperfence=[five.high for five in fives],
                orientation="h",
                name=_text(name),
                offsetgroup=str(place),
                boxpoints="all",
                pointpos=0,
                jitter=0.5,
                marker={"size": 3, "opacity": 0.4, "color": COLOURS[place % len(COLOURS)]},
                line={"color": COLOURS[place % len(COLOURS)], "width": 1.2},
                fillcolor="rgba(255,255,255,0)",
            ),
            **at,
        )
    drawn.add_vline(x=panel.level, line={"color": "#333", "width": 1}, **at)
    drawn.update_xaxes(title_text=_wrapped(panel.meaning, 90), **at)
    drawn.update_yaxes(title_text=panel.y, autorange="reversed", **at)
    drawn.update_layout(boxmode="group")


_DRAW: dict[type, Any] = {Bars: _draw_bars, Scatter: _draw_scatter, Curves: _draw_curves, Boxes: _draw_boxes}


def _text(text: str) -> str:
    """A text as plotly shows it as it is: its tags are not tags."""
    return html.escape(text, quote=False)


def _wrapped(text: str, width: int = 48) -> str:
    return "<br>".join(map(_text, textwrap.wrap(text, width)))


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else MISSING


def _interval(low: float, high: float) -> str:
    return f"interval {low:.4g} to {high:.4g}" if math.isfinite(low) and math.isfinite(high) else ""
