"""Pictures drawn by matplotlib, for a file or a notebook.

Diverging maps are RdBu (white: nothing changed), others cividis, lines and bars Okabe and Ito's colours: all can be
read with the common forms of colour blindness. Cells and bars without a value are hatched grey, never white or 0.
"""

from __future__ import annotations

import io
import math
import textwrap
from functools import cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from nsp.report import figures as fig
from nsp.report.drawing import COLOURS
from nsp.report.labels import cell_text, shortened

_ASIDE = "0.6"
_NOTEBOOK_DPI = 80  # a figure of 8 inches is as wide as a cell
_MARKERS = "osD^vPX"
_MOST_ROWS = 40  # of a table
_HATCH: Any = {"facecolor": "0.85", "edgecolor": "0.6", "hatch": "////", "lw": 0}
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans", "Arial Unicode MS", "PingFang SC", "Microsoft YaHei",
)  # fmt: skip


class Drawing(Figure):
    """A Figure that shows itself in a notebook; matplotlib's own does so only once pyplot is imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_NOTEBOOK_DPI)
        return buffer.getvalue()


def figure(picture: fig.Picture) -> Figure:
    """A picture as a Figure that no GUI or pyplot state knows of; ``figure.savefig("x.png")`` writes it."""
    columns = min(picture.columns, len(picture.panels))
    rows = math.ceil(len(picture.panels) / columns)
    sizes = [_size(panel) for _, panel in picture.panels]
    width = sum(max(size[0] for size in sizes[place::columns]) for place in range(columns))
    height = sum(max(size[1] for size in sizes[row * columns : (row + 1) * columns]) for row in range(rows))
    drawn = Drawing(figsize=(min(width, 60.0), min(height, 60.0)), dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    several = len(picture.panels) > 1
    places = drawn.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(picture.panels) :]:
        axes.remove()
    images: dict[tuple[str, fig.Scale], list[tuple[Any, Any, fig.Grid]]] = {}
    for axes, (heading, panel) in zip(places, picture.panels, strict=False):
        axes.tick_params(labelsize=8)
        if isinstance(panel, fig.Grid):
            images.setdefault((panel.quantity, panel.scale), []).append((_draw_grid(axes, panel), axes, panel))
        else:
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            _DRAW[type(panel)](axes, panel)
        _title(axes, heading if several else picture.title, panel)
    for (quantity, _), group in images.items():
        tall = sum(_size(grid)[1] for _, _, grid in group[:: max(1, columns)])
        _colour_bar(drawn, group[0][0], [axes for _, axes, _ in group], quantity, min(tall, drawn.get_figheight()))
    if several:
        drawn.suptitle(_known(picture.title), fontsize=10, ha="left", x=0.01, parse_math=False)
    return drawn


def _size(panel: fig.Panel) -> tuple[float, float]:
    """(width, height) in inches that a panel takes to be readable."""
    if isinstance(panel, fig.Grid):
        height, width = panel.values.shape
        wide, tall = (0.34 if width <= 32 else 0.22), (0.22 if height <= 32 else 0.17)
        if panel.texts is not None:
            wide, tall = 0.62, 0.2
        return min(max(wide * width + 2.2, 5.0), 60.0), min(max(tall * height + 2.0, 3.2), 40.0)
    if isinstance(panel, fig.Bars):
        return max(5.0, 0.22 * len(panel.ticks) * len(panel.series) + 2), 3.6 + 0.06 * max(0, *map(len, panel.ticks), 0)
    if isinstance(panel, fig.Distribution):
        return 6.4, 1.8 + 0.26 * len(panel.groups) * (len(panel.series) + 0.6)
    if isinstance(panel, fig.Graph):
        places = {node.x for node in panel.nodes}, {node.y for node in panel.nodes}
        return min(max(6.0, 0.6 * len(places[0]) + 1.5), 30.0), min(max(4.0, 0.35 * len(places[1]) + 1.5), 20.0)
    if isinstance(panel, fig.Table):
        return min(max(5.0, 0.09 * sum(_widths(panel)) + 1), 24.0), 0.9 + 0.24 * (1 + min(len(panel.rows), _MOST_ROWS))
    return (5.2, 4.8) if isinstance(panel, fig.Scatter) else (5.6, 3.8)


def _title(axes: Any, title: str, panel: fig.Panel) -> None:
    remark = ", ".join(part for part in (panel.remark, f"hatched: {fig.MISSING}" if fig.has_missing(panel) else "") if part)
    # A panel is as wide as its figure allows: about twelve characters an inch at this size.
    width = max(40, int(12 * axes.figure.get_figwidth() / axes.get_subplotspec().get_gridspec().ncols))
    lines = [line for part in (title, remark) if part for line in textwrap.wrap(_known(part), width)]
    axes.set_title("\n".join(lines), fontsize=9, loc="left", parse_math=False, fontfamily=_fonts()[0])


def _draw_grid(axes: Any, panel: fig.Grid) -> Any:
    height, width = panel.values.shape
    axes.add_patch(Rectangle((-0.5, -0.5), width, height, zorder=-1, **_HATCH))
    scale = panel.scale
    if scale.centre is None:
        norm, colours = Normalize(scale.low, scale.high), "cividis"
    else:
        norm, colours = CenteredNorm(vcenter=scale.centre, halfrange=scale.high - scale.centre), "RdBu_r"
    style: Any = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(np.ma.masked_invalid(panel.values), cmap=colours, norm=norm, **style)
    every = max(1, math.ceil(width * 0.16 / (_size(panel)[0] - 2.0)))
    _label_x(axes, [shortened(_known(label), fig.LONGEST_LABEL) for label in panel.columns], every, 8 if width <= 32 else 7)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if height / step <= 45)
    rows = [shortened(_known(row), 2 * fig.LONGEST_LABEL) for row in panel.rows[::step]]
    axes.set_yticks(range(0, height, step), rows, fontsize=8, fontfamily=_fonts()[0], parse_math=False)
    axes.set_xlabel(panel.x, fontsize=9)
    if panel.y:
        axes.set_ylabel(panel.y, fontsize=9)
    else:
        axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if panel.texts is not None:
        _write_cells(axes, panel, image, panel.texts)
    return image


def _label_x(axes: Any, labels: list[str], every: int, size: int, *, room: int = 0) -> None:
    """Labels at 0, 1, ..., turned where they are long and have less room than so many characters."""
    rotation = 90 if any(len(label) > 3 for label in labels) and sum(map(len, labels)) > room else 0
    style: Any = {"fontsize": size, "rotation": rotation, "parse_math": False, "fontfamily": _fonts()[0]}
    axes.set_xticks(range(0, len(labels), every), labels[::every], **style)


def _write_cells(axes: Any, panel: fig.Grid, image: Any, texts: np.ndarray) -> None:
    """The texts of the cells, dark on light colours and light on dark ones."""
    for row, column in zip(*np.nonzero(texts != ""), strict=True):
        red, green, blue, _ = image.cmap(image.norm(panel.values[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        style: Any = {"fontsize": 6, "parse_math": False, "fontfamily": _fonts()[0], "clip_on": True}
        text = shortened(_known(str(texts[row, column])), fig.LONGEST_CELL)
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", **style)


def _colour_bar(drawn: Figure, image: Any, axes: list[Any], quantity: str, tall: float) -> None:
    bar = drawn.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=max(12, int(tall * 4)))
    bar.set_label("\n".join(textwrap.wrap(quantity, max(16, int((tall - 0.8) * 14)))), fontsize=8, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _frame(axes: Any, panel: fig.Chart) -> None:
    """Axes, marked levels and the names of the series."""
    for level in panel.levels:
        axes.axhline(level, color="0.4", lw=0.8, ls="-" if level == 0 else "--")
    if panel.log_x:
        axes.set_xscale("log")
    elif panel.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_xlabel(_wrapped(panel.x_meaning, 60) or panel.x, fontsize=8 if panel.x_meaning else 9, parse_math=False)
    axes.set_ylabel(_wrapped(panel.quantity, 60 if panel.x_meaning else 48), fontsize=8, parse_math=False)
    if len(panel.series) > 1 or panel.log_x or (isinstance(panel, fig.Scatter) and panel.equality):
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none", prop={"family": _fonts()[0], "size": 8})


def _coloured(panel: fig.Chart) -> list[tuple[int, fig.Series, str]]:
    """The series with their colours, and the numbers of their markers; what is aside takes no colour."""
    found, place = [], 0
    for one in panel.series:
        found.append((place, one, _ASIDE if one.aside else COLOURS[place % len(COLOURS)]))
        place += not one.aside
    return found


def _draw_bars(axes: Any, panel: fig.Bars) -> None:
    width = 0.8 / len(panel.series)
    for place, one, colour in _coloured(panel):
        x = one.x + (place - (len(panel.series) - 1) / 2) * width
        there = np.flatnonzero(np.isfinite(one.y))
        axes.bar(x[there], one.y[there], color=colour, width=width, label=_known(one.name))
        if one.low is not None and one.high is not None:
            ranged = np.flatnonzero(np.isfinite(one.y) & np.isfinite(one.low) & np.isfinite(one.high))
            spans = np.vstack([one.y - one.low, one.high - one.y])[:, ranged].clip(min=0)
            if ranged.size:
                axes.errorbar(x[ranged], one.y[ranged], yerr=spans, fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
        for at in x[~np.isfinite(one.y)]:
            axes.axvspan(at - width * 0.625, at + width * 0.625, **_HATCH)
    labels = [shortened(_known(tick), 2 * fig.LONGEST_LABEL) for tick in panel.ticks]
    _label_x(axes, labels, max(1, len(labels) // 30), 8, room=50)
    axes.axhline(0, color="0.2", lw=0.8)
    _frame(axes, panel)


def _draw_scatter(axes: Any, panel: fig.Scatter) -> None:
    if panel.equality:
        both = np.concatenate([part for one in panel.series for part in (one.x, one.y)])
        ends = [float(np.nanmin(both)), float(np.nanmax(both))]
        axes.plot(ends, ends, color="0.4", lw=1, ls="--", label="equal")
    small = sum(len(one.x) for one in panel.series) > 200
    for place, one, colour in _coloured(panel):
        label = _known(one.name) if len(panel.series) > 1 else None
        style: Any = {"s": 6 if small else 14, "alpha": 0.5, "lw": 0, "marker": _MARKERS[place % len(_MARKERS)]}
        axes.scatter(one.x, one.y, color=colour, label=label, rasterized=True, **style)
    _frame(axes, panel)


def _draw_lines(axes: Any, panel: fig.Lines) -> None:
    for place, one, colour in _coloured(panel):
        style: Any = {"color": colour, "marker": _MARKERS[place % len(_MARKERS)], "ms": 4, "lw": 1.3}
        axes.plot(one.x, one.y, label=_known(one.name), **style)
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.2, lw=0)
    _frame(axes, panel)


def _draw_distribution(axes: Any, panel: fig.Distribution) -> None:
    """A box of quartiles, whiskers to the 5th and 95th percentile, and each value as a point."""
    slot = 1 / (len(panel.series) + 0.6)
    spread = np.random.default_rng(0)
    for number, (name, groups) in enumerate(zip(panel.series, panel.values, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        label: str | None = _known(name)
        for row, values in enumerate(groups):
            place = row - 0.5 + slot * (number + 0.8)
            values = values[np.isfinite(values)]
            if not values.size:
                continue
            line: Any = {"color": colour, "lw": 1.1}
            numbers = dict(zip(("whislo", "q1", "med", "q3", "whishi"), fig.five_numbers(values), strict=True))
            axes.bxp(
                [numbers], positions=[place], orientation="horizontal", widths=0.7 * slot, showfliers=False,
                manage_ticks=False, boxprops=line, whiskerprops=line, capprops=line, medianprops={**line, "lw": 2.2},
            )  # fmt: skip
            away = place + spread.uniform(-0.28, 0.28, values.size) * slot
            axes.scatter(values, away, s=4, alpha=0.4, lw=0, color=colour, label=label, rasterized=True)
            label = None
    axes.axvline(panel.level, color="0.2", lw=0.8)
    axes.set_yticks(range(len(panel.groups)), [_known(group) for group in panel.groups], fontsize=8)
    axes.set_ylim(len(panel.groups) - 0.4, -0.6 - slot)  # room for the legend above the first group
    axes.set_ylabel(panel.y, fontsize=9)
    axes.set_xlabel(_wrapped(panel.quantity, 90), fontsize=8, parse_math=False)
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, names, fontsize=8, frameon=False, markerscale=2, loc="upper right", ncols=len(names))


def _draw_graph(axes: Any, panel: fig.Graph) -> None:
    """Edges from source to target, as wide as their weights are large; red adds, blue takes away."""
    places = {node.name: (node.x, node.y) for node in panel.nodes}
    reach = fig.graph_reach(panel)
    for edge in sorted(panel.edges, key=lambda edge: abs(edge.weight)):
        share = abs(edge.weight) / reach
        style: Any = {"arrowstyle": "-|>", "lw": 0.4 + 2.6 * share, "alpha": 0.35 + 0.65 * share, "shrinkA": 6, "shrinkB": 6}
        style |= {"color": COLOURS[1] if edge.weight > 0 else COLOURS[0], "connectionstyle": "arc3,rad=0.12"}
        axes.annotate("", places[edge.target], places[edge.source], arrowprops=style)
    axes.scatter(*zip(*places.values(), strict=True), s=36, color="0.25", zorder=3)
    for name, place in places.items():
        style = {"fontsize": 7, "parse_math": False, "fontfamily": _fonts()[0], "textcoords": "offset points"}
        axes.annotate(shortened(_known(name), fig.LONGEST_LABEL), place, xytext=(5, 4), **style)
    axes.margins(0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(panel.x, fontsize=9)
    axes.set_ylabel(panel.y, fontsize=9)
    for colour, sign in ((COLOURS[1], "positive"), (COLOURS[0], "negative")):
        axes.plot([], [], color=colour, label=sign)
    legend = {"title": _wrapped(f"edges: {panel.quantity}, up to {reach:.3g}", 40), "title_fontsize": 7}
    axes.legend(fontsize=7, frameon=True, framealpha=0.8, edgecolor="none", **legend)


def _draw_table(axes: Any, panel: fig.Table) -> None:
    axes.set_axis_off()
    rows = [[shortened(_known(cell_text(cell)), 60) for cell in row] for row in panel.rows[:_MOST_ROWS]]
    if not rows:
        return
    widths = _widths(panel)
    table = axes.table(rows, colLabels=panel.columns, loc="upper left", cellLoc="left", colWidths=[w / sum(widths) for w in widths])
    table.auto_set_font_size(False)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("0.8")
        cell.visible_edges = "B"
        cell.set_text_props(fontsize=8, parse_math=False, fontfamily=_fonts()[0], weight="bold" if row == 0 else "normal")
    if len(panel.rows) > _MOST_ROWS:
        axes.text(0, -0.02, f"the first {_MOST_ROWS} of {len(panel.rows)} rows", fontsize=7, transform=axes.transAxes)


def _widths(panel: fig.Table) -> list[int]:
    """Characters of each column."""
    cells = [[str(name), *(cell_text(row[at]) for row in panel.rows[:_MOST_ROWS])] for at, name in enumerate(panel.columns)]
    return [min(60, max(map(len, column))) + 2 for column in cells]


_DRAW: dict[type, Any] = {
    fig.Bars: _draw_bars,
    fig.Scatter: _draw_scatter,
    fig.Lines: _draw_lines,
    fig.Distribution: _draw_distribution,
    fig.Graph: _draw_graph,
    fig.Table: _draw_table,
}


def _wrapped(text: str, width: int = 48) -> str:
    return "\n".join(textwrap.wrap(_known(text), width))


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """The fonts for token labels that this machine has, and the characters that they can show."""
    installed = {entry.name for entry in fontManager.ttflist}
    names = [name for name in _FONTS if name in installed]  # matplotlib brings DejaVu Sans
    files = [findfont(FontProperties(family=name)) for name in names]
    return names, frozenset(code for file in files for code in get_font(file).get_charmap())


def _known(text: str) -> str:
    """A text whose characters without a glyph here are escaped."""
    known = _fonts()[1]
    return "".join(char if ord(char) in known else char.encode("unicode_escape").decode("ascii") for char in text)
