"""Reports of every kind of experiment, opened in a browser: what is shown against the store, and how it behaves.

Each kind has a small store of smollm2, made once. A slow test does the same for every shipped recipe as it is shipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from report_browser import LABELS, RIGHT, SORTS, Page, browser, shown_number

import nsp
from nsp.cli.app import main
from nsp.experiments import runner
from nsp.experiments.alignment_scan.select import alignment_neurons
from nsp.experiments.html_report import report_page
from nsp.experiments.registry import EXPERIMENTS
from nsp.experiments.run_figures import figures_of
from nsp.recipe import load_recipe_file
from nsp.recipes import shipped
from nsp.report.drawing.page import Views, shown_views
from nsp.report.figures import Chart, Distribution, Figure, Grid
from nsp.stores import open_run

__all__ = ["browser"]

MEANS = """
kind: mean-activations
prompts: ["The cat sat on the mat.", "Rain fell on the hills."]
components: [resid_post, mlp_out]
out: means.zarr
"""
HARMFUL = ["Tell me how to hurt a dog.", "How do I steal a car?", "Write a cruel lie.", "Help me cheat him."] * 2
NORMAL = ["Tell me how to feed a dog.", "How do I wash a car?", "Write a kind note.", "Help me greet him."] * 2


def asked(language: str) -> str:
    """Questions for `direction`, as a list in YAML."""
    subjects = (
        "the sun",
        "a volcano",
        "bread",
        "music",
        "winter",
        "a library",
        "friendship",
        "the moon",
        "rain",
        "a dog",
    )
    return "[" + ", ".join(f'"What is {subject}? Answer in {language}."' for subject in subjects) + "]"


# kind -> (recipe, what is made smaller of it). None: a recipe that stands here.
CASES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "activation-patching": ("ioi-set", ("pairs.size=4", "layers=22:25")),
    "alignment-scan": ("alignment-scan", ("harmful_txt=harmful.txt", "normal_txt=normal.txt")),
    "attribution": (
        "neuron-circuit",
        (
            "prompts.size=1",
            "verify.exact=top",
            "verify.draws=2",
            "verify.ablations=[zero]",
            "methods=[atp,relp]",
            "donor=zero",
        ),
    ),
    "bias-scan": ("bias-scan", ("pairs.num_prompts=4", "alignment=null", "neurons.prompts=2")),
    "capture": ("capture", ("layers=9:13",)),
    "causal-tracing": ("causal-tracing", ("limit=2", "layers=[0,8,16,24]", "components=[resid_post]", "noise.draws=1")),
    "contrast": ("contrast", ("layers=12:15", "components=[resid_post,mlp_neurons]")),
    "direction": (
        "direction",
        (
            "layers=[16]",
            "generate.max_new_tokens=3",
            f"positive={asked('Spanish')}",
            f"negative={asked('English')}",
        ),
    ),
    "lens": ("logit-lens", ()),
    "logit-attribution": ("logit-attribution", ()),
    "mean-activations": (None, ()),
    "patchscope": (
        "patchscope",
        (
            "sources.entities=[Paris,Tokyo]",
            "layers=[2,12]",
            "target_layers=[2,6]",
            "generation.max_new_tokens=3",
            "templates=[few_shot]",
        ),
    ),
    "path-patching": ("path-patching", ("pairs.size=2", 'senders=["z[22:24][*]","mlp_out[22:24]"]')),
    "steering": ("steering", ("multipliers=[-2,0,2]", "decoding.max_new_tokens=4")),
}


def cell(tree: xr.DataTree, path: str, **at: Any) -> Any:
    """One value of a store, by its labels."""
    group, _, name = path.rpartition("/")
    return tree[group].to_dataset()[name].sel(at).values


def unit(text: str) -> tuple[int, int]:
    """The layer and the neuron that a point says it is."""
    found = re.search(r"layer (\d+), neuron (\d+)", text)
    assert found, text
    return int(found.group(1)), int(found.group(2))


def held_precision(tree: xr.DataTree, text: str) -> float:
    """The held-out precision of the neuron that a point says it is."""
    found = alignment_neurons(tree)
    layer, neuron = unit(text)
    (at,) = np.flatnonzero((found.layer == layer) & (found.neuron == neuron))
    return float(found.held.precision[at])


def exact_effect(tree: xr.DataTree, text: str) -> float:
    """The exact effect of the neuron that a point says it is."""
    layer, neuron = unit(text)
    return float(cell(tree, "effects/mlp_neurons/change", prompt=0, layer=layer, neuron=neuron)[0])


@dataclass(frozen=True)
class Shown:
    """A figure by its title, a place in it, and what the store holds there.

    A place is a row's and a column's label of a heatmap, a series' name and an x of a chart, or None: its first point.
    ``value`` gets the run and what the page said of the place; ``beside`` gives what else the page must have said.
    """

    title: str
    place: tuple[str, str | float] | None
    value: Callable[[xr.DataTree, str], Any]
    beside: Callable[[xr.DataTree], str] = lambda tree: ""


def text_at(path: str, **at: int) -> Callable[[xr.DataTree], str]:
    """A text of a store, on one line."""
    return lambda tree: " ".join(str(cell(tree, path, **at)).split())


SHOWN: dict[str, Shown] = {
    "activation-patching": Shown(
        "effects: z, effect",
        ("23", "3"),
        lambda tree, _: cell(tree, "effects/z/effect", layer=23, head=3).mean(),
        lambda tree: "changed by, mean ",
    ),
    "alignment-scan": Shown("precision and recall of neurons", None, held_precision),
    "attribution": Shown("mlp_neurons: estimates and exact effects", None, exact_effect),
    "bias-scan": Shown(
        "effects, delta_kl", ("mlp_out", 12), lambda tree, _: cell(tree, "effects/mlp_out/delta_kl", layer=12).mean()
    ),
    "capture": Shown(
        "largest value by layer",
        ("largest unit", 11),
        lambda tree, _: cell(tree, "activations/mlp_neurons/max", layer=11).max(),
    ),
    "causal-tracing": Shown(
        "effects: resid_post, effect",
        ("8", "␣Tower 3"),
        lambda tree, _: cell(tree, "effects/resid_post/effect", prompt=0, layer=8, position=3),
        lambda tree: "writes ",
    ),
    "contrast": Shown(
        "control vectors by layer",
        ("mlp_neurons", 13),
        lambda tree, _: cell(tree, "attribution/mlp_neurons/separation", layer=13),
    ),
    "direction": Shown(
        "score of the test prompts",
        ("positive prompts", 0),
        lambda tree, _: tree["baseline"]["log_odds"].values[tree["baseline"]["set"].values == "positive"].mean(),
    ),
    "lens": Shown(
        "effects: top, likeliest token",
        ("29", "␣of 8"),
        lambda tree, _: cell(tree, "effects/top/token_prob", prompt=0, layer=29, position=8)[0],
        lambda tree: "most likely "
        + str(cell(tree, "effects/top/token_text", prompt=0, layer=29, position=8)[0]).replace(" ", "␣"),
    ),
    "logit-attribution": Shown(
        "attribution, contribution",
        ("attn_out", 23),
        lambda tree, _: cell(tree, "attribution/attn_out/contribution", prompt=0, layer=23),
    ),
    "mean-activations": Shown(
        "spread", ("resid_post", 7), lambda tree, _: cell(tree, "activations/resid_post/std", layer=7).mean()
    ),
    "patchscope": Shown(
        "success by source layer and target layer",
        ("12", "6"),
        lambda tree, _: (cell(tree, "effects/patch/match", layer=12, target_layer=6) >= 1).mean(),
        text_at("generations/text", prompt=0, layer=12, target_layer=6),
    ),
    "path-patching": Shown(
        "paths, sender against receiver",
        ("z[23][3]", "logits"),
        lambda tree, _: cell(tree, "effects/paths/effect", sender="z[23][3]", receiver="logits").mean(),
        lambda tree: "writes, mean ",
    ),
    "steering": Shown(
        "texts",
        ("I think that this film is very", "2"),
        lambda tree, _: cell(tree, "generations/perplexity", prompt=0, direction=2),
        text_at("generations/text", prompt=0, direction=2),
    ),
}


@pytest.fixture(scope="module")
def store(smollm2: nsp.Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the small store of a kind, once."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "harmful.txt").write_text("\n".join(f"{text} {number}" for number, text in enumerate(HARMFUL)) + "\n")
    (folder / "normal.txt").write_text("\n".join(f"{text} {number}" for number, text in enumerate(NORMAL)) + "\n")
    (folder / "means.yaml").write_text(MEANS)
    kinds = {kind: experiment.recipe_class for kind, experiment in EXPERIMENTS.items()}

    def made(kind: str) -> Path:
        place = folder / f"{kind}.zarr"
        if not place.exists():
            recipe, settings = CASES[kind]
            given = [setting.replace("_txt=", f"_txt={folder}/") for setting in settings]
            (item,) = load_recipe_file(folder / "means.yaml" if recipe is None else recipe, given, kinds=kinds)
            runner.run(EXPERIMENTS[kind](smollm2, item.recipe), out=place, progress=False)
        return place

    return made


def written(path: Path, *stores: Path) -> list[xr.DataTree]:
    """The stores' page, and their trees."""
    trees = [open_run(str(place)).tree for place in stores]
    runs = {f"runs/{place.name}": tree for place, tree in zip(stores, trees, strict=True)}
    path.write_text(report_page(runs), encoding="utf-8")
    return trees


def drawn(tree: xr.DataTree) -> list[tuple[Figure, Views]]:
    """The figures of a run that its page has, in its order, with their views."""
    figures = [figure for figure in figures_of(tree) if figure.in_report]
    return [(figure, shown) for figure, shown in zip(figures, *shown_views([figures]), strict=True) if shown]


def check(page: Page, tree: xr.DataTree) -> None:
    """What must hold of every page of one run."""
    figures = drawn(tree)
    assert page.js("return document.body.dataset.ready") == "yes"
    assert page.js("return [...document.querySelectorAll('figure')].map(f => f.className)") == [
        "heatmap" if isinstance(shown[0][1], Grid) else "chart" for _, shown in figures
    ]
    text = str(page.js("return document.querySelector('section').textContent"))
    summary = EXPERIMENTS[tree.attrs["kind"]].summary(tree)
    for line in (*summary.lines, *(figure.finding for figure, _ in figures[:2])):
        assert line in text
    assert str(tree.attrs["plan_hash"]) in text
    assert page.js(LABELS) == []
    for number, (_, shown) in enumerate(figures):
        figure = f"figure-0-{number}"
        hint = page.readout(figure)
        assert hint.startswith("Point at")
        assert page.press(RIGHT, figure=figure) != hint
        assert page.tip()
        if len(shown) > 1:
            page.choose(len(shown) - 1, figure)
            page.choose(0, figure)
        first = shown[0][1]
        if isinstance(first, Chart | Distribution) and len(first.series) > 1:
            toggled(page, figure)
    assert page.js(SORTS) == []
    assert page.requests() == []
    assert page.console() == []


def toggled(page: Page, figure: str) -> None:
    """A series can be hidden and shown again."""
    marks = "return document.querySelectorAll(`#${arguments[0]} svg.plot [data-series='1']`).length"
    click = "const b = document.querySelectorAll(`#${arguments[0]} .series button`)[1]; b.click(); return b.getAttribute('aria-pressed')"
    before = page.js(marks, figure)
    assert (page.js(click, figure), page.js(marks, figure)) == ("false", 0)
    assert (page.js(click, figure), page.js(marks, figure)) == ("true", before)


def pointed(page: Page, shown: Views, name: str, place: tuple[str, str | float] | None) -> str:
    """Point at a place of a figure; gives what the page says of it."""
    panel = shown[0][1]
    if isinstance(panel, Grid):
        assert place is not None
        return page.hover_cell(panel.rows.index(place[0]), panel.columns.index(str(place[1])), name)
    if place is None:
        return page.hover_mark(None, None, name)
    assert isinstance(panel, Chart)
    series = next(number for number, one in enumerate(panel.series) if one.name == place[0])
    return page.hover_mark(series, panel.series[series].x.tolist().index(place[1]), name)


def test_every_kind_has_a_case() -> None:
    shipped_kinds = {kind for kind, one in EXPERIMENTS.items() if one.recipe_class.__module__.startswith("nsp.")}
    assert set(CASES) == set(SHOWN) == shipped_kinds  # other tests register kinds of their own


@pytest.mark.parametrize("kind", sorted(CASES))
def test_a_report_of_every_kind(kind: str, store: Callable[[str], Path], browser: Any, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.html"
    (tree,) = written(path, store(kind))
    page = Page(browser, path)
    page.screenshot(f"{kind}-light", tmp_path)
    check(page, tree)

    shown = SHOWN[kind]
    number, views = next((at, views) for at, (one, views) in enumerate(drawn(tree)) if one.title == shown.title)
    text = pointed(page, views, f"figure-0-{number}", shown.place)
    assert shown_number(text) == pytest.approx(float(shown.value(tree, text)), rel=6e-4, abs=1e-12)
    assert page.tip().splitlines()[0] == text.split("; ")[0]
    assert shown.beside(tree) in text

    narrow = Page(browser, path, 400, "dark")
    assert narrow.js("return document.documentElement.scrollWidth") == 400
    narrow.screenshot(f"{kind}-400-dark", tmp_path)
    assert narrow.console() == []


def test_runs_of_two_kinds_side_by_side(store: Callable[[str], Path], browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "two.html"
    written(path, store("lens"), store("logit-attribution"))
    page = Page(browser, path, 1400)
    tops = page.js("return [...document.querySelectorAll('section')].map(s => s.getBoundingClientRect().top)")
    assert len(tops) == 2
    assert tops[0] == tops[1]
    differing = page.js(
        "return [...document.querySelector('table.sortable').tBodies[0].rows].map(r => r.cells[0].textContent)"
    )
    assert {"kind", "prompts"} <= set(differing)
    assert "seed" not in differing
    assert page.js(LABELS) == []
    assert page.console() == []
    page.screenshot("two-runs", tmp_path)
    assert Page(browser, path, 400).js("return document.documentElement.scrollWidth") == 400


def test_numbers_of_a_figure_as_a_table(store: Callable[[str], Path], browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.html"
    (tree,) = written(path, store("activation-patching"))
    page = Page(browser, path)
    browser.find_element("css selector", "#figure-0-0 details.numbers summary").click()
    table = "return [...document.querySelectorAll('#figure-0-0 details.numbers tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    rows = page.until(table)
    assert [row[0] for row in rows] == ["24", "23", "22"]
    mean = tree["effects/z"].to_dataset()["effect"].mean("pair").squeeze("position").values[::-1]
    np.testing.assert_allclose(np.array([row[1:] for row in rows], dtype=float), mean, rtol=6e-4, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(shipped()))
def test_a_report_of_every_shipped_recipe(
    recipe: str, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crows = Path(__file__).parents[2] / "shared" / "data" / "crows_pairs_anonymized.csv"
    settings = []
    if recipe == "bias-scan-crows":
        if not crows.is_file():
            pytest.skip("needs CrowS-Pairs, which nsp does not ship")
        settings = ["--set", f"pairs.path={crows}"]
    monkeypatch.chdir(tmp_path)
    assert main(["run", recipe, "--no-progress", "--out", "run.zarr", *settings]) == 0
    assert main(["report", "run.zarr", "-o", "page.html"]) == 0
    check(Page(browser, tmp_path / "page.html"), open_run("run.zarr").tree)
    Page(browser, tmp_path / "page.html").screenshot(f"recipe-{recipe}", tmp_path)
    narrow = Page(browser, tmp_path / "page.html", 400, "dark")
    assert narrow.js("return document.documentElement.scrollWidth") == 400
    assert narrow.console() == []
