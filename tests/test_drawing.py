"""Every sort of panel in every back end: matplotlib, plotly, the report's page in a browser, the terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest
import xarray as xr
from report_browser import LABELS, LEFT, RIGHT, SORTS, Page, browser
from rich.console import Console

from nsp.report.drawing import draw
from nsp.report.drawing.terminal import draw_text
from nsp.report.figures import (
    SHARE,
    Bars,
    Distribution,
    Edge,
    Graph,
    Grid,
    Lines,
    Node,
    Panel,
    Picture,
    Scatter,
    Series,
    Table,
    View,
    diverging,
    figure,
)
from nsp.report.page import Section, page
from nsp.report.summary import Summary

__all__ = ["browser"]

X = np.arange(3.0)
VALUES = np.array([[0.1, 0.5, np.nan], [0.9, 0.25, 0.0]])
TWO = tuple(Series(name=name, x=X, y=X * sign, low=X * sign - 1, high=X * sign + 1) for name, sign in (("one", 1), ("two", -1)))
CELLS: dict[str, Any] = {"values": VALUES, "rows": ("0", "1"), "columns": ("<b>a 0", "b 1", "c 2"), "y": "layer", "x": "position"}
NODES = (
    Node("z[3][1]", 3, 1, 0.5, "writes to the stream"), Node("mlp_out[4]", 4, 0, -0.25), Node("<i>logits", 6, 0),
)  # fmt: skip
EDGES = (Edge("z[3][1]", "mlp_out[4]", 0.75), Edge("mlp_out[4]", "<i>logits", -1.5), Edge("z[3][1]", "<i>logits", 0.1))
PANELS: dict[str, Panel] = {
    "grid": Grid(**CELLS, scale=diverging(VALUES), low=VALUES - 0.1, high=VALUES + 0.1, meaning="effect"),
    "text-grid": Grid(**CELLS, scale=SHARE, texts=np.array([["the", " of", ""], [" a", "b", "c"]]), meaning="probability"),
    "bars": Bars(series=TWO, ticks=("clean", "corrupt", "patched"), x="run", y="score", meaning="score", units="nats"),
    "lines": Lines(series=TWO, x="layer", y="effect", meaning="effect", levels=(0.0, 1.0), whole=True),
    "log-lines": Lines(
        series=(Series(name="one", x=10.0**X, y=10.0**-X),), x="size", y="share", meaning="share", log_x=True, log_y=True
    ),
    "scatter": Scatter(series=TWO, x="estimate", y="exact", meaning="exact effect", equality=True, x_told=True),
    "distribution": Distribution(
        groups=("all", "age"), series=("base",), values=((np.arange(9.0), np.arange(4.0)),), y="type", meaning="gap", units="nats",
        notes=((tuple(f"pair {number}" for number in range(9)), ("w", "x", "y", "z")),),
    ),
    "graph": Graph(nodes=NODES, edges=EDGES, x="layer", y="head", meaning="effect of the path", units="logits"),
    "table": Table(columns=("site", "effect"), rows=(("<u>one", 0.5), ("two", -2.25), ("three", 10.0)), meaning="strongest sites"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PANELS))
def test_a_panel_is_drawn_by_matplotlib_and_plotly(name: str) -> None:
    picture = Picture("a title", (("first", PANELS[name]), ("second", PANELS[name])), columns=2)
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        buffer = io.BytesIO()
        draw(picture).savefig(buffer, format=ending)
        assert buffer.getvalue().startswith(start)
    interactive = draw(picture, interactive=True)
    text = interactive.to_html(include_plotlyjs=False)
    assert "a title" in text
    for tag in ("<b>a", "<i>logits", "<u>one"):
        assert tag not in text


def printed(panel: Panel) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(draw_text(panel, "a title", 80))
    return stream.getvalue()


@pytest.mark.parametrize("name", list(PANELS))
def test_a_panel_is_drawn_in_a_terminal(name: str) -> None:
    text = printed(PANELS[name])
    assert text.startswith("a title")
    assert max(map(len, text.splitlines())) <= 80


def test_what_a_graph_and_a_table_say_in_a_terminal() -> None:
    rows = printed(PANELS["graph"]).splitlines()
    edges = [row.split() for row in rows if "[" in row and "from" not in row]
    assert edges == [["mlp_out[4]", "<i>logits", "-1.500"], ["z[3][1]", "mlp_out[4]", "0.750"], ["z[3][1]", "<i>logits", "0.100"]]
    assert "three    10.000" in printed(PANELS["table"])


def test_a_graph_has_its_edges_and_nodes_in_both_figures() -> None:
    picture = Picture("", (("", PANELS["graph"]),))
    static, interactive = draw(picture), draw(picture, interactive=True)
    nodes = static.axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(nodes, [[3, 1], [4, 0], [6, 0]])
    arrows = [text.arrow_patch for text in static.axes[0].texts if text.arrow_patch is not None]
    assert len(arrows) == 3
    assert max(arrow.get_linewidth() for arrow in arrows) == arrows[-1].get_linewidth()  # the strongest is drawn last
    *lines, points = interactive.data
    assert [line.customdata[0] for line in lines][-1] == "mlp_out[4] → &lt;i&gt;logits: -1.5 logits"
    assert list(points.x) == [3, 4, 6]


def test_every_panel_in_a_browser(browser: Any, tmp_path: Path) -> None:
    figures = [
        figure(name, f"a {name}", View(make=lambda panel=panel: panel, name="a"), View(make=lambda panel=panel: panel, name="b"))
        for name, panel in PANELS.items()
    ]
    path, tree = tmp_path / "panels.html", xr.DataTree()
    path.write_text(page([Section("x.zarr", tree, Summary("panels"), "", figures)]), encoding="utf-8")
    shown = Page(browser, path)
    shown.screenshot("panels-light", tmp_path)
    assert shown.js("return document.body.dataset.ready") == "yes"
    number = {name: f"figure-0-{at}" for at, name in enumerate(PANELS)}
    graph = number["graph"]
    assert shown.js("return document.querySelectorAll(arguments[0] + ' .edge').length", f"#{graph}") == 3
    assert shown.hover_mark(0, 0, graph) == (
        "z[3][1]: 0.5; writes to the stream; to mlp_out[4]: 0.75 logits; to <i>logits: 0.1 logits"
    )
    assert shown.press(RIGHT, RIGHT, figure=graph).startswith("<i>logits; from mlp_out[4]: -1.5 logits")
    assert shown.press(LEFT, figure=number["distribution"])
    assert shown.hover_mark(0, 3, number["distribution"]) == "all, pair 3: 3 nats"
    tables = "return [...document.querySelectorAll('#' + arguments[0] + ' .rows')].map((rows) => rows.hidden)"
    assert shown.js(tables, number["table"]) == [False, True]
    shown.choose(1, number["table"])
    assert shown.js(tables, number["table"]) == [True, False]
    for name in PANELS:
        if name != "table":
            shown.choose(1, number[name])
    assert shown.js(LABELS) == []
    assert shown.js(SORTS) == []
    assert shown.console() == []
    dark = Page(browser, path, 400, "dark")
    assert dark.js("return document.documentElement.scrollWidth") == 400
    dark.screenshot("panels-400-dark", tmp_path)


def test_figures_are_made_and_paged_without_what_draws_or_computes() -> None:
    modules = "nsp.report.page, nsp.report.default_figures, nsp.report.drawing.terminal, nsp.experiments.run_figures"
    heavy = "{'torch', 'nnsight', 'transformers', 'matplotlib', 'plotly'}"
    script = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    assert run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
