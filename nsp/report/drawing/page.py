"""Figures as HTML for the report's page: the frame of each, and the data from which the page's script draws it.

The data is JSON of plain values, numbers of four digits and null where there is none. A figure's views are all of one
sort (a heatmap, a chart, a table), since they share one element.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from html import escape
from typing import Any

import numpy as np

from nsp.report import figures as fig
from nsp.report.labels import quoted_value
from nsp.report.series import thinned

_MOST_VIEWS = 100
_MOST_CELLS = 60_000  # of one grid
_MOST_NUMBERS = 300_000  # of all grids of a figure: about 2 MB of a page

Views = list[tuple[fig.View, fig.Panel]]  # what the page has of a figure


def shown_views(runs: Sequence[Sequence[fig.Figure]]) -> list[list[Views]]:
    """What the page shows of each run's figures: views of the first metric, as many as have room.

    Heatmaps of one quantity get one scale, within a run and across runs.
    """
    chosen = [[_with_room(figure) for figure in figures] for figures in runs]
    scaled = iter(fig.same_scale(panel for figures in chosen for shown in figures for _, panel in shown))
    return [[[(view, next(scaled)) for view, _ in shown] for shown in figures] for figures in chosen]


def figure_html(figure: fig.Figure, shown: Views, number: str) -> str:
    """One figure with its caption, its menu of views, what it says of the place pointed at, and its data."""
    views = [{"name": view.name, "about": _about(panel), **_data(panel)} for view, panel in shown]
    kind = "heatmap" if isinstance(shown[0][1], fig.Grid) else "table" if isinstance(shown[0][1], fig.Table) else "chart"
    # "</" would end the script element early, whatever a token says.
    data = json.dumps({"views": views}, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    names = [view.name for view, _ in shown]
    choose = f"<span> ({escape(names[0])})</span>" if len(names) == 1 and names[0] else ""
    if len(names) > 1:
        options = "".join(f'<option value="{at}">{escape(name)}</option>' for at, name in enumerate(names))
        choose = f'<label class="choose">shown: <select>{options}</select></label>'
    count = len(_views(figure))
    left = f" (the first {len(shown)} of {count} views)" if len(shown) < count else ""
    caption = f'<strong>{escape(figure.title)}</strong>: <span class="about">{escape(views[0]["about"])}</span>{left}{choose}'
    body = _body(kind, figure.title, [panel for _, panel in shown], number)
    return f"""<figure class="{kind}" id="figure-{number}">
<figcaption>{caption}</figcaption>
{body}
<script type="application/json">{data}</script>
</figure>"""


def table_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that sorts when a column's name is clicked."""
    numeric = [bool(rows) and all(_is_number(row[at]) for row in rows) for at in range(len(columns))]
    kinds = [' class="number"' if number else "" for number in numeric]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(str(name))}</button></th>'
        for kind, name in zip(kinds, columns, strict=True)
    )
    body = "".join("<tr>" + "".join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True)) + "</tr>" for row in rows)
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return f'<div class="scroll"><table class="sortable">{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _with_room(figure: fig.Figure) -> Views:
    """Views of a figure's first metric that the page has room for; none where one grid alone is too large."""
    shown: Views = []
    numbers = 0
    for view in _views(figure):
        panel = view.panel
        if isinstance(panel, fig.Grid):
            if panel.values.size > _MOST_CELLS:
                return []
            numbers += panel.values.size * (1 + len(panel.details))
        if shown and (numbers > _MOST_NUMBERS or len(shown) > _MOST_VIEWS):
            break
        shown.append((view, panel))
    return shown


def _views(figure: fig.Figure) -> list[fig.View]:
    """The views that a page would show had it room: of a heatmap, those of its first metric."""
    first = figure.views[0]
    return [view for view in figure.views if not isinstance(first.panel, fig.Grid) or view.metric == first.metric]


def _body(kind: str, title: str, panels: Sequence[fig.Panel], number: str) -> str:
    tables = [table_html(title, one.columns, one.rows) for one in panels if isinstance(one, fig.Table)]
    if tables:
        return "\n".join(f'<div class="rows"{" hidden" if at else ""}>{table}</div>' for at, table in enumerate(tables))
    label = escape(f"{'Heatmap' if kind == 'heatmap' else 'Chart'} of {title}, {_along(panels[0])}. Arrow keys move between ", quote=True)
    told = f'tabindex="0" role="img" aria-describedby="readout-{number}"'
    if kind == "heatmap":
        drawn = f"""<div class="scroll"><canvas class="grid" {told} aria-label="{label}cells."></canvas></div>
<div class="legend"><span class="low"></span><div class="ramp"></div><span class="high"></span><span>grey, hatched: no value</span></div>"""
    else:
        drawn = f'<div class="series"></div>\n<svg class="plot" {told} aria-label="{label}points."></svg>'
    hint = f"Point at {'a cell' if kind == 'heatmap' else 'the figure'}, or move with the arrow keys."
    return f"""{drawn}
<div class="readout" id="readout-{number}" role="status" aria-live="polite">{hint}</div>
<details class="numbers"><summary>Its numbers as a table</summary>
<div class="scroll" tabindex="0" role="group" aria-label="Numbers of the figure"></div></details>"""


def _about(panel: fig.Panel) -> str:
    along = _along(panel)
    return f"{panel.quantity}{f'; {along}' if along else ''}{f' ({panel.remark})' if panel.remark else ''}"


def _along(panel: fig.Panel) -> str:
    if isinstance(panel, fig.Grid):
        return f"{panel.y} against {panel.x}" if panel.y else panel.x
    if isinstance(panel, fig.Chart):
        return f"{panel.y} over {panel.x_meaning or panel.x}"
    if isinstance(panel, fig.Graph):
        return f"{panel.y} over {panel.x}"
    return f"by {panel.y}" if isinstance(panel, fig.Distribution) else ""


def _data(panel: fig.Panel) -> dict[str, Any]:
    """What the page's script needs of a panel: its own fields, as plain values."""
    if isinstance(panel, fig.Table):
        return {}
    if isinstance(panel, fig.Distribution):
        return _distribution_data(panel)
    if isinstance(panel, fig.Graph):
        return _graph_data(panel)
    if isinstance(panel, fig.Scatter):
        panel = replace(panel, series=tuple(map(_thinned, panel.series)))
    data = _plain(panel) | {"form": type(panel).__name__.lower()}
    return {name: value for name, value in data.items() if name not in ("meaning", "remark", "finding")}


def _thinned(one: fig.Series) -> fig.Series:
    """A cloud with as many points as a page has room for."""
    kept = thinned(len(one.x), one.x, one.y)
    if len(kept) == len(one.x):
        return one
    notes = tuple(one.notes[at] for at in kept) if one.notes else ()
    ends: dict[str, Any] = {name: None if end is None else end[kept] for name, end in (("low", one.low), ("high", one.high))}
    return replace(one, name=f"{one.name} ({len(kept)} of {len(one.x)} drawn)", x=one.x[kept], y=one.y[kept], notes=notes, **ends)


def _plain(value: Any) -> Any:
    """Values as JSON has them: numbers of four digits, null where there is none, texts with their spaces visible."""
    if isinstance(value, fig.Panel | fig.Series | fig.Scale):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, np.ndarray):
        return [_plain(row) if isinstance(row, np.ndarray) else _cell_value(row) for row in value]
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _distribution_data(panel: fig.Distribution) -> dict[str, Any]:
    """Boxes over the groups as ticks, with every value as a point beside its fellows."""
    slot = 0.8 / len(panel.series)
    spread = np.random.default_rng(0)
    series = []
    for place, (name, groups) in enumerate(zip(panel.series, panel.values, strict=True)):
        middle = (place - (len(panel.series) - 1) / 2) * slot
        points, notes, boxes = [], [], []
        for at, values in enumerate(groups):
            kept = np.flatnonzero(np.isfinite(values))
            boxes += [[at + middle, 0.35 * slot, *_numbers(np.array(fig.five_numbers(values)))]] if kept.size else []
            kept = kept[thinned(len(kept), values[kept])]
            points += [(at + middle + 0.28 * slot * away, values[one]) for one, away in zip(kept, spread.uniform(-1, 1, len(kept)), strict=True)]
            notes += [f"{panel.groups[at]}{f', {panel.notes[place][at][one]}' if panel.notes else ''}" for one in kept]
        x, y = (np.array([point[axis] for point in points], dtype=float) for axis in (0, 1))
        series.append({"name": name, "x": _numbers(x), "y": _numbers(y), "notes": notes, "boxes": boxes})
    axes = {"x": panel.y, "y": "value", "units": panel.units, "ticks": panel.groups, "levels": [panel.level]}
    return {"form": "scatter", **axes, "series": series}


def _graph_data(panel: fig.Graph) -> dict[str, Any]:
    """Nodes as points that tell their strongest edges; edges as lines between them."""
    nodes, reach = {node.name: node for node in panel.nodes}, fig.graph_reach(panel)
    units = f" {panel.units}" if panel.units else ""
    notes = []
    for node in panel.nodes:
        edges = sorted((edge for edge in panel.edges if node.name in (edge.source, edge.target)), key=lambda edge: -abs(edge.weight))
        told = [f"from {edge.source}" if edge.target == node.name else f"to {edge.target}" for edge in edges[:5]]
        ends = [f"{end}: {edge.weight:.4g}{units}" for end, edge in zip(told, edges, strict=False)]
        notes.append("; ".join(part for part in (node.name, node.note, *ends) if part))
    lines = [
        [nodes[edge.source].x, nodes[edge.source].y, nodes[edge.target].x, nodes[edge.target].y, _rounded(edge.weight / reach)]
        for edge in sorted(panel.edges, key=lambda edge: abs(edge.weight))
    ]
    series = {
        "name": "node",
        "x": [node.x for node in panel.nodes],
        "y": [node.y for node in panel.nodes],
        "told": _numbers(np.array([node.value for node in panel.nodes])),
        "notes": notes,
        "names": [node.name for node in panel.nodes],
    }
    return {"form": "scatter", "x": panel.x, "y": panel.y, "units": "", "whole": True, "edges": lines, "series": [series]}


def _cell_value(value: Any) -> float | str | None:
    return _rounded(value) if isinstance(value, float | int | np.number) else quoted_value(value)


def _numbers(values: np.ndarray) -> list[float | None]:
    """A row of numbers of four digits; None where there is none."""
    return [_rounded(value) for value in np.asarray(values, dtype=np.float64).reshape(-1)]


def _rounded(value: Any) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _cell(cell: Any, kind: str) -> str:
    if isinstance(cell, float):
        # Three decimals hide what is small.
        text = "no value" if math.isnan(cell) else f"{cell:.3g}" if 0 < abs(cell) < 0.01 else f"{cell:.3f}"
        return f'<td{kind} data-value="{cell!r}">{text}</td>'
    return f"<td{kind}>{escape('-' if cell is None else str(cell))}</td>"


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def figures_html(figures: Sequence[fig.Figure], shown: Sequence[Views], number: int) -> list[str]:
    """The figures of one run that have anything to show."""
    there = [(figure, views) for figure, views in zip(figures, shown, strict=True) if views]
    return [figure_html(figure, views, f"{number}-{at}") for at, (figure, views) in enumerate(there)]
