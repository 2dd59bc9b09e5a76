"""Pictures drawn by plotly: an HTML file, or a notebook's figure, where pointing at a mark tells its numbers.

The same panels, colours and words as matplotlib's. Importing this module needs plotly (``pip install 'nsp[plotly]'``).
"""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nsp.report import figures as fig
from nsp.report.drawing import COLOURS
from nsp.report.labels import cell_text, shortened

_DIVERGING = (
    "#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f",
)  # fmt: skip
_SEQUENTIAL = "Cividis"
_GREY = "#d9d9d9"  # what shines through where a grid has no value
_ASIDE = "#999999"
_MARKERS = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "x")
_POINT = "%{customdata}<extra></extra>"

Place = dict[str, int]


def figure(picture: fig.Picture) -> go.Figure:
    """A picture as a plotly Figure."""
    count = len(picture.panels)
    columns = min(picture.columns, count)
    rows = math.ceil(count / columns)
    panels = [panel for _, panel in picture.panels]
    heights = [max(map(_height, panels[row * columns : (row + 1) * columns])) for row in range(rows)]
    total = sum(heights) + 90
    kinds = [{"type": "table" if isinstance(panel, fig.Table) else "xy"} for panel in panels] + [None] * (rows * columns - count)
    drawn = make_subplots(
        rows=rows,
        cols=columns,
        specs=[kinds[row * columns : (row + 1) * columns] for row in range(rows)],
        row_heights=[height / sum(heights) for height in heights],
        subplot_titles=[_heading(name if count > 1 else "", panel) for name, panel in picture.panels],
        vertical_spacing=min(140 / total, 0.9 / max(1, rows - 1)) if rows > 1 else 0,
        horizontal_spacing=0.12 if columns > 1 else 0,
    )
    bars: dict[tuple[str, fig.Scale], str] = {}
    for at, (name, panel) in enumerate(picture.panels):
        place = {"row": at // columns + 1, "col": at % columns + 1}
        if isinstance(panel, fig.Grid):
            axis = bars.setdefault((panel.quantity, panel.scale), f"coloraxis{len(bars) + 1}" if bars else "coloraxis")
            _draw_grid(drawn, panel, place, axis)
        elif isinstance(panel, fig.Chart):
            _draw_chart(drawn, panel, place, name if count > 1 else "", str(at))
        else:
            _DRAW[type(panel)](drawn, panel, place)
    for at, ((quantity, scale), axis) in enumerate(bars.items()):
        drawn.update_layout({axis: _colour_axis(quantity, scale, 1.0 + 0.12 * at)})
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


def _height(panel: fig.Panel) -> int:
    """Pixels of one panel."""
    if isinstance(panel, fig.Grid):
        return min(max(20 * len(panel.rows) + 180, 320), 2400)
    if isinstance(panel, fig.Distribution):
        return 180 + 34 * len(panel.groups) * len(panel.series)
    if isinstance(panel, fig.Table):
        return min(80 + 30 * len(panel.rows), 1200)
    if isinstance(panel, fig.Graph):
        return min(max(400, 40 * len({node.y for node in panel.nodes})), 1200)
    return 480 if isinstance(panel, fig.Scatter) else 400


def _heading(name: str, panel: fig.Panel) -> str:
    parts = [name, panel.remark, f"grey: {fig.MISSING}" if fig.has_missing(panel) else ""]
    return _wrapped(", ".join(part for part in parts if part), 60 if name else 90)


def _draw_grid(drawn: go.Figure, panel: fig.Grid, at: Place, colours: str) -> None:
    height, width = panel.values.shape
    texts = None
    if panel.texts is not None:
        texts = [[_text(shortened(str(cell), fig.LONGEST_CELL)) for cell in row] for row in panel.texts]
    notes = np.empty(panel.values.shape, dtype=object)
    for row, column in np.ndindex(notes.shape):
        notes[row, column] = "<br>".join(map(_text, fig.grid_lines(panel, row, column)))
    drawn.add_trace(
        go.Heatmap(
            z=panel.values,
            x=np.arange(width),
            y=np.arange(height),
            customdata=notes,
            hovertemplate=_POINT,
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
    labels = [_text(shortened(label, fig.LONGEST_LABEL)) for label in panel.columns]
    rows = [_text(shortened(row, 2 * fig.LONGEST_LABEL)) for row in panel.rows]
    every, step = max(1, math.ceil(width / 80)), max(1, math.ceil(height / 45))
    ticks = {"tickmode": "array", "showgrid": False, "zeroline": False}
    drawn.update_xaxes(
        title_text=panel.x, tickvals=list(range(0, width, every)), ticktext=labels[::every], range=[-0.5, width - 0.5],
        tickangle=-90 if any(len(label) > 3 for label in labels) else 0, **ticks, **at,
    )  # fmt: skip
    drawn.update_yaxes(
        title_text=panel.y, tickvals=list(range(0, height, step)), ticktext=rows[::step], range=[-0.5, height - 0.5], **ticks, **at
    )
    # A grey field behind the cells: what has no value is grey, never the colour of zero.
    edges = {"x0": -0.5, "x1": width - 0.5, "y0": -0.5, "y1": height - 0.5}
    drawn.add_shape(type="rect", fillcolor=_GREY, line_width=0, layer="below", **edges, **at)


def _colour_axis(quantity: str, scale: fig.Scale, place: float) -> dict[str, Any]:
    colours: dict[str, Any] = {"colorscale": _SEQUENTIAL, "cmin": scale.low, "cmax": scale.high}
    if scale.centre is not None:
        colours["colorscale"] = [[at / (len(_DIVERGING) - 1), colour] for at, colour in enumerate(_DIVERGING)]
        colours["cmid"] = scale.centre
    return {**colours, "colorbar": {"title": {"text": _wrapped(quantity), "side": "right"}, "x": place, "thickness": 14}}


def _draw_chart(drawn: go.Figure, panel: fig.Chart, at: Place, heading: str, group: str) -> None:
    """Lines, bars or points, with the axes and marked levels that they share."""
    if isinstance(panel, fig.Scatter) and panel.equality:
        both = np.concatenate([part for one in panel.series for part in (one.x, one.y)])
        ends, line = [float(np.nanmin(both)), float(np.nanmax(both))], {"color": "#666", "dash": "dash", "width": 1}
        drawn.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip"), **at)
    place = 0
    for one in panel.series:
        colour = _ASIDE if one.aside else COLOURS[place % len(COLOURS)]
        shared: dict[str, Any] = {"customdata": _notes(panel, one), "hovertemplate": _POINT, "name": _text(one.name), "legendgroup": group}
        shared["showlegend"] = len(panel.series) > 1
        if place == 0 and heading:
            shared["legendgrouptitle_text"] = _text(heading)
        marker = _MARKERS[place % len(_MARKERS)]
        if isinstance(panel, fig.Bars):
            _add_bars(drawn, one, colour, shared, at)
        elif isinstance(panel, fig.Lines):
            _add_line(drawn, one, colour, marker, shared, at)
        else:
            style = {"size": 4 if len(one.x) > 200 else 6, "opacity": 0.5, "color": colour, "symbol": marker}
            drawn.add_trace(go.Scattergl(x=one.x, y=one.y, mode="markers", marker=style, **shared), **at)
        place += not one.aside
    for level in panel.levels:
        drawn.add_hline(y=level, line={"color": "#666", "width": 1, "dash": "solid" if level == 0 else "dash"}, **at)
    axis: dict[str, Any] = {"type": "log" if panel.log_x else "linear"}
    if isinstance(panel, fig.Bars):
        step = max(1, len(panel.ticks) // 30)
        axis = {"tickmode": "array", "tickvals": list(range(0, len(panel.ticks), step)), "ticktext": [*map(_text, panel.ticks[::step])]}
    drawn.update_xaxes(title_text=_wrapped(panel.x_meaning) or _text(panel.x), **axis, **at)
    drawn.update_yaxes(title_text=_wrapped(panel.quantity), type="log" if panel.log_y else "linear", **at)


def _notes(panel: fig.Chart, one: fig.Series) -> list[str]:
    """What is told of each point: what it is, its numbers, its interval."""
    ticks = panel.ticks if isinstance(panel, fig.Bars) else ()
    found = []
    for at, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
        place = one.notes[at] if one.notes else f"{panel.x} {ticks[int(x)] if ticks else fig.number(float(x))}"
        lines = [one.name if len(panel.series) > 1 else "", *place.split("; "), fig.number(float(y))]
        if isinstance(panel, fig.Scatter) and panel.x_told:
            lines[-1] = f"{panel.x} {x:.4g}, {panel.y} {y:.4g}"
        if one.low is not None and one.high is not None:
            lines.append(fig.interval(float(one.low[at]), float(one.high[at])))
        found.append("<br>".join(_text(line) for line in lines if line))
    return found


def _add_bars(drawn: go.Figure, one: fig.Series, colour: str, shared: dict[str, Any], at: Place) -> None:
    error = None
    if one.low is not None and one.high is not None and np.isfinite(one.low).any():
        ends = [np.nan_to_num(end) for end in (one.high - one.y, one.y - one.low)]
        error = {"type": "data", "array": ends[0], "arrayminus": ends[1], "color": "#333"}
    drawn.add_trace(go.Bar(x=one.x, y=one.y, marker_color=colour, error_y=error, **shared), **at)
    for place in one.x[~np.isfinite(one.y)]:
        drawn.add_vrect(x0=place - 0.5, x1=place + 0.5, fillcolor=_GREY, line_width=0, layer="below", **at)


def _add_line(drawn: go.Figure, one: fig.Series, colour: str, marker: str, shared: dict[str, Any], at: Place) -> None:
    if one.low is not None and one.high is not None:
        there = np.isfinite(one.low) & np.isfinite(one.high)
        x = np.concatenate([one.x[there], one.x[there][::-1]])
        y = np.concatenate([one.high[there], one.low[there][::-1]])
        band: Any = {"fill": "toself", "fillcolor": colour, "opacity": 0.2, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        drawn.add_trace(go.Scatter(x=x, y=y, showlegend=False, legendgroup=shared["legendgroup"], **band), **at)
    style: Any = {"mode": "lines+markers", "line": {"color": colour}, "marker": {"symbol": marker, "size": 6}}
    drawn.add_trace(go.Scatter(x=one.x, y=one.y, **style, **shared), **at)


def _draw_distribution(drawn: go.Figure, panel: fig.Distribution, at: Place) -> None:
    for place, (name, groups) in enumerate(zip(panel.series, panel.values, strict=True)):
        kept = [np.flatnonzero(np.isfinite(values)) for values in groups]
        there = [row for row, chosen in enumerate(kept) if chosen.size]
        fences = zip(*(fig.five_numbers(groups[row]) for row in there), strict=True) if there else [()] * 5
        numbers = dict(zip(("lowerfence", "q1", "median", "q3", "upperfence"), map(list, fences), strict=True))
        notes = [[_text(panel.notes[place][row][at]) for at in kept[row]] for row in there] if panel.notes else None
        drawn.add_trace(
            go.Box(
                x=[groups[row][kept[row]].tolist() for row in there],
                y=[_text(panel.groups[row]) for row in there],
                text=notes,
                orientation="h",
                name=_text(name),
                offsetgroup=str(place),
                boxpoints="all",
                pointpos=0,
                jitter=0.5,
                marker={"size": 3, "opacity": 0.4, "color": COLOURS[place % len(COLOURS)]},
                line={"color": COLOURS[place % len(COLOURS)], "width": 1.2},
                fillcolor="rgba(255,255,255,0)",
                **numbers,
            ),
            **at,
        )
    drawn.add_vline(x=panel.level, line={"color": "#333", "width": 1}, **at)
    drawn.update_xaxes(title_text=_wrapped(panel.quantity, 90), **at)
    drawn.update_yaxes(title_text=panel.y, autorange="reversed", **at)
    drawn.update_layout(boxmode="group")


def _draw_graph(drawn: go.Figure, panel: fig.Graph, at: Place) -> None:
    """Edges as lines, as wide as their weights are large, with what they are at their middle; nodes with their names."""
    nodes = {node.name: node for node in panel.nodes}
    reach = fig.graph_reach(panel)
    for edge in sorted(panel.edges, key=lambda edge: abs(edge.weight)):
        ends, share = (nodes[edge.source], nodes[edge.target]), abs(edge.weight) / reach
        x, y = [one.x for one in ends], [one.y for one in ends]
        line = {"color": COLOURS[1] if edge.weight > 0 else COLOURS[0], "width": 0.6 + 4 * share}
        said = _text(f"{edge.source} → {edge.target}: {edge.weight:.4g}{' ' + panel.units if panel.units else ''}")
        style: Any = {"mode": "lines+markers", "marker": {"size": [0, 9, 0], "opacity": 0}, "showlegend": False, "opacity": 0.4 + 0.6 * share}
        x, y = [x[0], sum(x) / 2, x[1]], [y[0], sum(y) / 2, y[1]]
        drawn.add_trace(go.Scatter(x=x, y=y, line=line, customdata=[said] * 3, hovertemplate=_POINT, **style), **at)
    told = [_wrapped("; ".join(part for part in (one.name, _value(one.value), one.note) if part), 90) for one in panel.nodes]
    drawn.add_trace(
        go.Scatter(
            x=[one.x for one in panel.nodes],
            y=[one.y for one in panel.nodes],
            text=[_text(shortened(one.name, fig.LONGEST_LABEL)) for one in panel.nodes],
            mode="markers+text",
            textposition="top center",
            marker={"size": 10, "color": "#444"},
            customdata=told,
            hovertemplate=_POINT,
            showlegend=False,
        ),
        **at,
    )
    drawn.update_xaxes(title_text=_text(panel.x), **at)
    drawn.update_yaxes(title_text=_text(panel.y), **at)


def _draw_table(drawn: go.Figure, panel: fig.Table, at: Place) -> None:
    cells = [[_text(cell_text(row[place])) for row in panel.rows] for place in range(len(panel.columns))]
    header = {"values": [f"<b>{_text(name)}</b>" for name in panel.columns], "align": "left"}
    drawn.add_trace(go.Table(header=header, cells={"values": cells, "align": "left"}), **at)


_DRAW: dict[type, Any] = {fig.Distribution: _draw_distribution, fig.Graph: _draw_graph, fig.Table: _draw_table}


def _value(value: float) -> str:
    return fig.number(value) if math.isfinite(value) else ""


def _text(text: str) -> str:
    """A text as plotly shows it as it is: its tags are not tags."""
    return html.escape(text, quote=False)


def _wrapped(text: str, width: int = 48) -> str:
    return "<br>".join(map(_text, textwrap.wrap(text, width)))
