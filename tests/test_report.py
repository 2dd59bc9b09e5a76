"""The HTML report: its data against the store, what it does with hostile text, its size, and the page in a browser.

Reports of every kind of experiment are in test_report_kinds.py.
"""

from __future__ import annotations

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from fake_experiment import FakeExperiment, effect_values
from report_browser import DOWN, LEFT, Page, browser

from nsp.cli.app import main
from nsp.report.default_figures import figures_by_dims
from nsp.report.drawing.page import shown_views
from nsp.report.figures import Figure, Grid
from nsp.report.page import Section, page
from nsp.report.summary import Summary, SummaryTable
from nsp.statistics import mean_effects

__all__ = ["browser"]

HOSTILE = "</script><b>&\"'"
TOKENS = ["When", " Mary", HOSTILE, "\n"]
ATTRS = {"long_name": "normalised effect", "units": "1", "method": "made up by the tests"}


def coord(dim: str, values: Any) -> xr.Variable:
    return xr.Variable((dim,), values, {"long_name": dim})


def run(pairs: int = 3, layers: int = 5, tokens: list[str] = TOKENS, name: str = "made-up") -> xr.DataTree:
    """A patching run: effects and receipts (pair, layer, position), one cell of them without a value."""
    shape = (pairs, layers, len(tokens))
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[0, 1, 2] = np.nan
    coords = {
        "pair": coord("pair", np.arange(pairs)),
        "layer": coord("layer", np.arange(layers) + 10),
        "position": coord("position", np.arange(len(tokens))),
        "token_text": (("pair", "position"), np.array([tokens] * pairs, dtype=object)),
    }
    dims = ("pair", "layer", "position")
    names = np.array([f"pair of {HOSTILE} {row}" for row in range(pairs)], dtype=object)
    base = {"units": "logits", "method": "ordinary run"}
    tree = xr.DataTree.from_dict(
        {
            "inputs": xr.Dataset({"pair_name": (("pair",), names, ATTRS)}, {"pair": coords["pair"]}),
            "baseline": xr.Dataset(
                {"logit_diff_clean": (("pair",), np.arange(pairs) + 0.25, {"long_name": "clean", **base})},
                {"pair": coords["pair"]},
            ),
            "effects/resid_post": xr.Dataset({"effect": (dims, values, ATTRS)}, coords),
            "receipts/resid_post": xr.Dataset({"change_norm": (dims, np.abs(values) * 10, ATTRS)}, coords),
        }
    )
    tree.attrs = {
        "kind": "activation-patching",
        "recipe_resolved": {"name": name, "description": f"a run with {HOSTILE}"},
        "model": {"name": "tiny", "dtype": "float32", "device": "cpu", "weights_hash": "ab" * 32},
        "versions": {"nsp": "0"},
        "seeds": {"recipe": 0},
        "state": "complete",
        "created_at": "2026-01-01",
    }
    return tree


TABLE = SummaryTable("strongest sites", ("site", "effect"), (("one", 0.5), (HOSTILE, -2.25), ("three", 10.0)))


def html(*trees: xr.DataTree) -> str:
    findings = (f"a finding about {HOSTILE}",)
    return page([Section("x.zarr", tree, Summary("patching", findings, (TABLE,)), f"name: {HOSTILE}\n") for tree in trees])


class Parsed(HTMLParser):
    """The elements of a page, what it would load, and the data of its figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.data: list[dict[str, Any]] = []
        self._json = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "action", "data") and value]
        self._json = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self._json:
            self.data.append(json.loads(data, parse_constant=pytest.fail))  # NaN and Infinity are no JSON
            self._json = False


def close(shown: Any, stored: Any) -> None:
    """The page's numbers have four digits."""
    np.testing.assert_allclose(np.array(shown, dtype=float), stored, rtol=6e-4, atol=1e-30)


def test_the_page_holds_the_store_s_numbers() -> None:
    tree = run()
    effect = tree["effects/resid_post"].to_dataset()["effect"]
    (figure,) = Parsed(html(tree)).data
    for view in figure["views"]:
        assert view["rows"] == ["10", "11", "12", "13", "14"]
        assert view["columns"] == ["When 0", "␣Mary 1", f"{HOSTILE} 2", "\\n 3"]
        assert (view["y"], view["x"], view["scale"]["centre"]) == ("layer", "position", 0.0)
        assert view["scale"]["high"] == -view["scale"]["low"] == pytest.approx(np.nanmax(np.abs(effect.values)), rel=1e-3)
    mean, *pairs = figure["views"]
    found = mean_effects(effect, resamples=1000)
    for key, name in (("values", "mean"), ("low", "low"), ("high", "high")):
        close(mean[key], found[name].values)
    assert len(pairs) == 3
    for number, layer in enumerate(pairs):
        close(layer["values"], effect.values[number])  # None becomes NaN, where the store has NaN
        close(layer["details"]["changed by"], tree["receipts/resid_post"].to_dataset()["change_norm"].values[number])
        assert layer["name"].startswith(f"pair {number}: pair of")
    assert pairs[0]["values"][1][2] is None


def test_hostile_text_stays_text() -> None:
    parsed = Parsed(html(run()))
    assert "b" not in parsed.tags
    assert parsed.tags.count("script") == 2  # the data of one figure, and the page's own
    assert parsed.tags.count("section") == 1


def test_nothing_is_loaded_from_anywhere() -> None:
    text = html(run(), run(name="other"))
    assert [place for place in Parsed(text).loads if not place.startswith("#")] == ["data:,"]
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", text)


def test_a_large_run_stays_small() -> None:
    tokens = [f" token{number}" for number in range(64)]
    text = html(run(pairs=50, layers=30, tokens=tokens))
    assert len(text.encode()) < 5e6
    assert len(Parsed(text).data[0]["views"]) == 51


def test_what_is_too_much_is_left_out_and_said() -> None:
    text = html(run(pairs=30, layers=100, tokens=["a"] * 100))
    (figure,) = Parsed(text).data
    assert len(figure["views"]) == 15  # the mean and 14 pairs of 100 * 100 cells with their receipts
    assert "the first 15 of 31 views" in text
    assert "mean over 30 pairs" in figure["views"][0]["name"]


def test_runs_are_compared_on_one_scale() -> None:
    small, large = run(), run()
    large["effects/resid_post"] = large["effects/resid_post"].to_dataset() * 3
    large["effects/resid_post"]["effect"].attrs = ATTRS
    one, two = (figure["views"] for figure in Parsed(html(small, large)).data)
    alone = Parsed(html(small)).data[0]["views"]
    assert alone[0]["scale"]["high"] < one[0]["scale"]["high"] == two[0]["scale"]["high"]


def lens() -> xr.DataTree:
    """Numbers of two prompts of different tokens, layer by position."""
    texts = np.array([["a", "b", "c"], ["d", "e", "f"]], dtype=object)
    coords = {
        "prompt": coord("prompt", np.arange(2)),
        "layer": coord("layer", np.arange(2)),
        "position": coord("position", np.arange(3)),
        "token_text": (("prompt", "position"), texts),
    }
    dims = ("prompt", "layer", "position")
    values = np.arange(12.0).reshape(2, 2, 3)
    numbers = {name: coords[name] for name in ("prompt", "layer", "position")}
    groups = {
        "inputs": xr.Dataset(
            {"token_text": coords["token_text"]}, {name: coords[name] for name in ("prompt", "position")}
        ),
        "effects/lens": xr.Dataset({"entropy": (dims, values, {**ATTRS, "units": "nat"})}, numbers),
    }
    return xr.DataTree.from_dict(groups)


def only(tree: xr.DataTree) -> tuple[Figure, list[tuple[str, Grid]]]:
    """The one figure that a report of the tree has, and its views."""
    figures = [figure for figure in figures_by_dims(tree) if figure.in_report]
    ((shown,),) = shown_views([figures])
    return figures[0], [(view.name, panel) for view, panel in shown if isinstance(panel, Grid)]


def test_prompts_of_different_tokens_have_no_mean() -> None:
    _, views = only(lens())
    assert [name for name, _ in views] == ["prompt 0", "prompt 1"]
    assert [grid.columns for _, grid in views] == [("a 0", "b 1", "c 2"), ("d 0", "e 1", "f 2")]


def test_a_patchscope_tells_success_and_the_text() -> None:
    dims = ("prompt", "layer", "target_layer")
    coords = {
        "prompt": coord("prompt", [0, 1]),
        "layer": coord("layer", [3]),
        "target_layer": coord("target_layer", [0, 7]),
    }
    match = np.array([[[2, 0]], [[1, -1]]], dtype=np.int8)
    texts = np.array([[["Paris", "no"]], [[" Lyon", ""]]], dtype=object)
    groups = {
        "effects/patch": xr.Dataset({"score": (dims, match * 2.0, ATTRS), "match": (dims, match, ATTRS)}, coords),
        "generations": xr.Dataset({"text": (dims, texts, ATTRS)}, coords),
    }
    figure, ((_, mean), (_, first), (_, second)) = only(xr.DataTree.from_dict(groups))
    assert figure.title == "effects: patch, success"
    np.testing.assert_array_equal([mean.values, first.values, second.values], [[[1, 0]], [[1, 0]], [[1, np.nan]]])
    assert list(second.details["text"][0]) == [" Lyon", ""]
    data = [view["details"].get("text") for view in Parsed(html(xr.DataTree.from_dict(groups))).data[0]["views"]]
    assert data == [None, [["Paris", "no"]], [["␣Lyon", None]]]


def test_vectors_and_random_sets_are_no_heatmaps() -> None:
    direction, neuron, step = (
        coord("direction", np.arange(2)),
        coord("neuron", np.arange(4)),
        coord("step", np.arange(3)),
    )
    layer = coord("layer", np.arange(2))
    tree = xr.DataTree.from_dict(
        {
            "circuit/chosen": xr.Dataset(
                {"vector": (("direction", "neuron"), np.ones((2, 4)), ATTRS)}, {"neuron": neuron}
            ),
            "circuit/knockout": xr.Dataset({"random": (("direction",), np.ones(2), ATTRS)}, {"direction": direction}),
            "attribution/x": xr.Dataset(
                {"gain": (("layer", "step"), np.ones((2, 3)), ATTRS)}, {"step": step, "layer": layer}
            ),
        }
    )
    assert figures_by_dims(tree) == []


def test_a_table_s_missing_number_is_said() -> None:
    table = SummaryTable("x", ("site", "effect"), (("one", float("nan")), ("two", 1.0)))
    text = page([Section("x.zarr", run(), Summary("t", (), (table,)), "")])
    assert '<td class="number" data-value="nan">no value</td>' in text


def test_an_unfinished_run_and_items_left_out_are_warnings() -> None:
    tree = run()
    tree.attrs["state"] = "running"
    inputs = tree["inputs"].to_dataset()
    tree["inputs"] = inputs.assign_attrs(left_out=2, left_out_items=["pair 7: misaligned", "pair 9: misaligned"])
    text = html(tree)
    assert text.count('<p class="warning">') == 2
    assert "this run is not complete (state running)" in text
    assert "2 item(s) were left out, such as pair 7: misaligned" in text


def test_the_command_writes_one_page_of_several_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeExperiment()
    monkeypatch.chdir(tmp_path)
    fake.install(monkeypatch)
    Path("toy.yaml").write_text("kind: toy\nout: a.zarr\n")
    assert main(["run", "toy.yaml"]) == 0
    assert main(["run", "toy.yaml", "--out", "b.zarr", "--set", "mode=backwards"]) == 0
    capsys.readouterr()
    assert main(["report", "a.zarr", "b.zarr", "-o", "pages/two.html"]) == 0
    assert capsys.readouterr().out.startswith("wrote pages/two.html (")
    assert os.listdir("pages") == ["two.html"]
    text = Path("pages/two.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert parsed.tags.count("section") == 2
    assert "mode: backwards" in text
    for figure in parsed.data:
        for number, layer in enumerate(figure["views"][1:]):
            close(layer["values"], effect_values()[number])
    for arguments, message in (
        (["nosuch.zarr"], "no such store: nosuch.zarr"),
        (["a.zarr", "-o", "page.pdf"], "page.pdf: a report ends in .html"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err


def number(value: float) -> str:
    return str(float(f"{value:.4g}"))


def test_a_browser_shows_what_the_store_holds(browser: Any, tmp_path: Path) -> None:
    tree, path = run(), tmp_path / "report.html"
    path.write_text(html(tree), encoding="utf-8")
    effect = tree["effects/resid_post"].to_dataset()["effect"]
    found = mean_effects(effect, resamples=1000)
    shown = Page(browser, path)
    assert shown.js("return document.body.dataset.ready") == "yes"

    told = shown.hover_cell(3, 1)
    mean, low, high = (number(float(found[name].values[3, 1])) for name in ("mean", "low", "high"))
    changed = number(float(tree["receipts/resid_post"].to_dataset()["change_norm"].values[:, 3, 1].mean()))
    assert told == f"layer 13, position ␣Mary 1: {mean} [{low}, {high}] (95 %); changed by, mean {changed}"
    assert shown.tip().splitlines() == told.split("; ")

    assert shown.press(LEFT, DOWN).startswith(f"layer 12, position When 0: {number(float(found['mean'].values[2, 0]))} ")

    shown.choose(1)
    change = number(float(tree["receipts/resid_post"].to_dataset()["change_norm"].values[0, 4, 3]))
    assert shown.hover_cell(4, 3) == f"layer 14, position \\n 3: {number(float(effect.values[0, 4, 3]))}; changed by {change}"
    assert shown.hover_cell(1, 2) == f"layer 11, position {HOSTILE} 2: no value"

    cells = "return [...document.querySelectorAll('table.sortable tbody tr td:nth-child(2)')].slice(0, 3).map(c => c.textContent)"
    button = browser.find_elements("css selector", "table.sortable th button")[1]
    button.click()
    assert shown.js(cells) == ["10.000", "0.500", "-2.250"]
    button.click()
    assert shown.js(cells) == ["-2.250", "0.500", "10.000"]
    assert shown.js("return document.querySelectorAll('th')[1].getAttribute('aria-sort')") == "ascending"

    shown.screenshot("report-light", tmp_path)
    assert shown.requests() == []
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (400, "light"), (1200, "dark")])
def test_it_fits_a_phone_and_the_night(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    wide = run(tokens=[f" token{number}" for number in range(40)], name="a-name-" + "x" * 80)
    path.write_text(html(wide, run(name="second")), encoding="utf-8")
    shown = Page(browser, path, width, scheme)
    assert shown.js("return document.documentElement.scrollWidth") == width
    paper, ink = shown.js("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    dark, light = (
        int(re.findall(r"\d+", colour)[0]) for colour in ((paper, ink) if scheme == "dark" else (ink, paper))
    )
    assert dark < 60
    assert light > 200
    shown.screenshot(f"report-{width}-{scheme}", tmp_path)
    assert browser.get_log("browser") == []


def test_cells_without_a_value_are_grey_and_zero_is_white(browser: Any, tmp_path: Path) -> None:
    tree, path = run(pairs=1), tmp_path / "report.html"
    tree["effects/resid_post"]["effect"][0, 3, 1] = 0.0
    path.write_text(html(tree), encoding="utf-8")
    shown = Page(browser, path)
    pixel = (
        "const c = document.querySelector('canvas'), [row, column] = arguments;"
        "return [...c.getContext('2d').getImageData(Number(c.dataset.left) + column * c.dataset.cell + 2,"
        " (4 - row) * c.dataset.tall + 2, 1, 1).data].slice(0, 3)"
    )
    assert shown.js(pixel, 3, 1) == [247, 247, 247]
    assert shown.js(pixel, 1, 2) == [154, 154, 154]


def test_a_large_page_opens_within_two_seconds(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(html(run(pairs=50, layers=30, tokens=[f" token{n}" for n in range(64)])), encoding="utf-8")
    shown, best = None, float("inf")
    for _ in range(3):  # a busy machine may be slow once
        start = time.perf_counter()
        shown = Page(browser, path)
        assert shown.js("return document.body.dataset.ready") == "yes"
        best = min(best, time.perf_counter() - start)
    assert best < 2
