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

_ASIDE = "0.6"
_NOTEBOOK_DPI = 80  # a figure of 8 inches is as wide as a cell
_MARKERS = "osD^vPX"
_HATCH: Any = {"facecolor": "0.85", "edgecolor": "0.6", "hatch": "////", "lw": 0}
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans",
    "Arial Unicode MS",
    "PingFang SC",
    "Microsoft YaHei",
)


class Drawing(Figure):
    """A Figure that shows itself in a notebook; matplotlib's own does so only once pyplot is imported."""

    def _repr_png_(self) -> bytes:
        found = io.BytesIO()
        self.savefig(found, format="png", dpi=_NOTEBOOK_DPI)
        return found.getvalue()


def figure(picture: Picture) -> Figure:
    """A picture as a Figure that no GUI or pyplot state knows of; ``figure.savefig("x.png")`` writes it."""
    columns = min(picture.columns, len(picture.panels))
    rows = math.ceil(len(picture.panels) / columns)
    sizes = [_size(panel) for panel in picture.panels]
    width = sum(max(size[0] for size in sizes[place::columns]) for place in range(columns))
    height = sum(max(size[1] for size in sizes[row * columns : (row + 1) * columns]) for row in range(rows))
    drawn = Drawing(figsize=(min(width, 60.0), min(height, 60.0)), dpi=150, layout="constrained")
    FigureCanvasAgg(drawn)
    several = len(picture.panels) > 1
    places = drawn.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(picture.panels) :]:
        axes.remove()
    images: dict[tuple[str, Scale], list[tuple[Any, Any, Grid]]] = {}
    for axes, panel in zip(places, picture.panels, strict=False):
        axes.tick_params(labelsize=8)
        heading = panel.name if several else picture.title
        if isinstance(panel, Grid):
            image = _draw_grid(axes, panel)
            images.setdefault((panel.meaning, panel.scale), []).append((image, axes, panel))
        else:
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            _DRAW[type(panel)](axes, panel)
        _title(axes, heading, panel.remark, missing=has_missing(panel))
    for (said, _), group in images.items():
        shared = [axes for _, axes, _ in group]
        tall = sum(_size(grid)[1] for _, _, grid in group[:: max(1, columns)])
        _colour_bar(drawn, group[0][0], shared, said, tall, drawn.get_figheight())
    if several:
        drawn.suptitle(_known(picture.title), fontsize=10, ha="left", x=0.01, parse_math=False)
    return drawn


def _size(panel: Panel) -> tuple[float, float]:
    """(width, height) in inches that a panel takes to be readable."""
    if isinstance(panel, Grid):
        height, width = panel.values.shape
        if panel.texts is not None:
            return min(max(0.62 * width + 2.2, 5.0), 60.0), min(max(0.2 * height + 2.0, 3.2), 40.0)
        wide, tall = (0.34 if width <= 32 else 0.22), (0.22 if height <= 32 else 0.17)
        return min(max(wide * width + 2.2, 5.0), 60.0), min(max(tall * height + 2.0, 3.2), 40.0)
    if isinstance(panel, Bars):
        return max(5.0, 0.22 * len(panel.labels) + 2), 3.6
    if isinstance(panel, Scatter):
        return 5.2, 4.8
    if isinstance(panel, Boxes):
        return 6.4, 1.8 + 0.26 * len(panel.groups) * (len(panel.series) + 0.6)
    return 5.6, 3.8


def _title(axes: Any, title: str, remark: str, *, missing: bool) -> None:
    remark = ", ".join(part for part in (remark, f"hatched: {MISSING}" if missing else "") if part)
    # A panel is as wide as its figure allows: about twelve characters an inch at this size.
    width = max(40, int(12 * axes.figure.get_figwidth() / axes.get_subplotspec().get_gridspec().ncols))
    lines = [line for part in (title, remark) if part for line in textwrap.wrap(_known(part), width)]
    axes.set_title("\n".join(lines), fontsize=9, loc="left", parse_math=False, fontfamily=_fonts()[0])


def _draw_grid(axes: Any, panel: Grid) -> Any:
    height, width = panel.values.shape
    axes.add_patch(Rectangle((-0.5, -0.5), width, height, zorder=-1, **_HATCH))
    scale = panel.scale
    if scale.centre is None:
        norm, colours = Normalize(scale.low, scale.high), "cividis"
    else:
        norm, colours = CenteredNorm(vcenter=scale.centre, halfrange=scale.high - scale.centre), "RdBu_r"
    image = axes.imshow(
        np.ma.masked_invalid(panel.values),
        cmap=colours,
        norm=norm,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    labels = [shortened(_known(label), LONGEST_LABEL) for label in panel.columns]
    inches = _size(panel)[0] - 2.0
    every = max(1, math.ceil(width * 0.16 / inches))
    rotation = 90 if any(len(label) > 3 for label in labels) else 0
    style: Any = {"fontsize": 8 if width <= 32 else 7, "rotation": rotation, "parse_math": False}
    axes.set_xticks(range(0, width, every), labels[::every], fontfamily=_fonts()[0], **style)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if height / step <= 45)
    axes.set_yticks(range(0, height, step), panel.rows[::step], fontsize=style["fontsize"])
    axes.set_xlabel(panel.x, fontsize=9)
    if panel.y:
        axes.set_ylabel(panel.y, fontsize=9)
    else:
        axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if panel.texts is not None:
        _write_cells(axes, panel, image)
    return image


def _write_cells(axes: Any, panel: Grid, image: Any) -> None:
    """The texts of the cells, dark on light colours and light on dark ones."""
    assert panel.texts is not None
    for row, column in zip(*np.nonzero(panel.texts != ""), strict=True):
        red, green, blue, _ = image.cmap(image.norm(panel.values[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        style: Any = {"fontsize": 6, "parse_math": False, "fontfamily": _fonts()[0], "clip_on": True}
        text = shortened(_known(str(panel.texts[row, column])), LONGEST_CELL)
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", **style)


def _colour_bar(drawn: Figure, image: Any, axes: list[Any], said: str, tall: float, height: float) -> None:
    tall = min(tall, height)
    bar = drawn.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=max(12, int(tall * 4)))
    bar.set_label("\n".join(textwrap.wrap(said, max(16, int((tall - 0.8) * 14)))), fontsize=8, parse_math=False)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _draw_bars(axes: Any, panel: Bars) -> None:
    there = np.flatnonzero(np.isfinite(panel.values))
    axes.bar(there, panel.values[there], color=COLOURS[0], width=0.8)
    ranged = np.flatnonzero(np.isfinite(panel.values) & np.isfinite(panel.low) & np.isfinite(panel.high))
    if ranged.size:
        mean = panel.values[ranged]
        spans = np.vstack([mean - panel.low[ranged], panel.high[ranged] - mean])
        axes.errorbar(ranged, mean, yerr=spans.clip(min=0), fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
    for place in np.flatnonzero(~np.isfinite(panel.values)):
        axes.axvspan(place - 0.5, place + 0.5, **_HATCH)
    step = max(1, len(panel.labels) // 30)
    axes.set_xticks(range(0, len(panel.labels), step), panel.labels[::step], fontsize=8)
    axes.axhline(0, color="0.2", lw=0.8)
    axes.set_xlabel(panel.x, fontsize=9)
    axes.set_ylabel(_wrapped(panel.meaning), fontsize=8, parse_math=False)


def _draw_scatter(axes: Any, panel: Scatter) -> None:
    both = np.concatenate([panel.x, panel.y])
    ends = [float(both.min()), float(both.max())]
    axes.plot(ends, ends, color="0.4", lw=1, ls="--", label="equal")
    axes.scatter(panel.x, panel.y, s=6, alpha=0.5, lw=0, color=COLOURS[0], rasterized=True)
    axes.set_xlabel(_wrapped(panel.x_meaning, 60), fontsize=8, parse_math=False)
    axes.set_ylabel(_wrapped(panel.y_meaning, 60), fontsize=8, parse_math=False)
    axes.legend(fontsize=8, frameon=False)


def _draw_curves(axes: Any, panel: Curves) -> None:
    number = 0
    for curve in panel.curves:
        colour = _ASIDE if curve.aside else COLOURS[number % len(COLOURS)]
        style: Any = {"color": colour, "marker": _MARKERS[number % len(_MARKERS)], "ms": 4, "lw": 1.3}
        axes.plot(curve.x, curve.y, label=_known(curve.name), **style)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, lw=0)
        number += not curve.aside
    for level in panel.levels:
        axes.axhline(level, color="0.4", lw=0.8, ls="-" if level == 0 else "--")
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    axes.set_xlabel(panel.x, fontsize=9)
    axes.set_ylabel(_wrapped(panel.meaning), fontsize=8, parse_math=False)
    if len(panel.curves) > 1 or panel.log_x:
        axes.legend(frameon=True, framealpha=0.8, edgecolor="none", prop={"family": _fonts()[0], "size": 8})


def _draw_boxes(axes: Any, panel: Boxes) -> None:
    """A box of quartiles, whiskers to the 5th and 95th percentile, and each value as a point."""
    slot = 1 / (len(panel.series) + 0.6)
    spread = np.random.default_rng(0)
    for number, (name, groups) in enumerate(zip(panel.series, panel.values, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        label: str | None = name
        for row, values in enumerate(groups):
            place = row - 0.5 + slot * (number + 0.8)
            values = values[np.isfinite(values)]
            if not values.size:
                continue
            line: Any = {"color": colour, "lw": 1.1}
            five = box(values)
            numbers = {"whislo": five.low, "q1": five.first, "med": five.median, "q3": five.third, "whishi": five.high}
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
    axes.set_xlabel(_wrapped(panel.meaning, 90), fontsize=8, parse_math=False)
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, names, fontsize=8, frameon=False, markerscale=2, loc="upper right", ncols=len(names))


_DRAW: dict[type, Any] = {Bars: _draw_bars, Scatter: _draw_scatter, Curves: _draw_curves, Boxes: _draw_boxes}


def _wrapped(text: str, width: int = 48) -> str:
    return "\n".join(textwrap.wrap(text, width))


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
