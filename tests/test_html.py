"""What values show in a notebook: against the value itself, with hostile text, and beside the text form, which stays."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tiny_models import HEADS, KV_HEADS, tiny_llama, tiny_tokenizer

import nsp
from nsp.engine.plan import Plan
from nsp.engine.receipts import Receipt, Receipts
from nsp.experiments import activation_patching
from nsp.experiments.circuits import Circuit, CircuitUnit
from nsp.html import MOST_ROWS, Table, Tokens, card, ranges
from nsp.progress import branch_bar
from nsp.report.summary import Summary, SummaryTable

HOSTILE = "<script>alert('\"&')</script>"


class Shown(HTMLParser):
    """A card as data: its elements, attributes, tables (rows of cell texts), tokens and notes."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.names: set[str] = set()
        self.captions: list[str] = []
        self.captioned: list[list[list[str]]] = []  # the table of each caption
        self.tables: list[list[list[str]]] = []
        self.tokens: list[str] = []
        self.notes: list[str] = []
        self._open: list[str] = []
        self.text = ""
        self.html = value if isinstance(value, str) else value._repr_html_()
        self.feed(self.html)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kinds = (dict(attrs).get("class") or "").split()
        self.elements.append(tag)
        self.names |= {name for name, _ in attrs}
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "caption":
            self.captions.append("")
            self.captioned.append(self.tables[-1])
        elif "nsp-token" in kinds:
            self.tokens.append("")
        elif "nsp-note" in kinds:
            self.notes.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self._open and self._open[-1] == "caption":
            self.captions[-1] += data
        elif self._open and self._open[-1] in ("span", "sub"):
            self.tokens[-1] += data
        elif self._open and self._open[-1] == "p" and self.notes:
            self.notes[-1] += data

    @property
    def facts(self) -> dict[str, str]:
        return {row[0]: row[1] for row in self.tables[0]}

    def rows(self, caption: str) -> list[dict[str, str]]:
        """The rows of the table whose caption begins so."""
        (table,) = [one for one, said in zip(self.captioned, self.captions, strict=True) if said.startswith(caption)]
        return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


@pytest.fixture(scope="module")
def tiny() -> nsp.Model:
    return nsp.load(tiny_llama(), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def swept(tiny: nsp.Model) -> nsp.Trace:
    with tiny.trace("a b c d", spans={"middle": "b c"}) as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor="a b x d"))
        t.measure(nsp.logit_diff("a", "b"))
    return t


def every_value(tiny: nsp.Model, swept: nsp.Trace, store: Path) -> list[Any]:
    pair = nsp.pair(clean="a b c", corrupt="a x c", answer="a", distractor="b")
    tree = activation_patching(tiny, pair, out=store)
    circuit = Circuit((CircuitUnit(1, -1, 5, 0.5), CircuitUnit(0, None, 2, -0.25)))
    return [
        tiny, tiny.encode("a b"), nsp.Site.parse("z[0][1] @ last"), swept, swept.plan, swept.receipts, swept.receipts[0], circuit,
        tree.nsp, tree.nsp.summary(), nsp.open_run(store),
    ]  # fmt: skip


def test_cards_are_whole_and_load_nothing(tiny: nsp.Model, swept: nsp.Trace, tmp_path: Path) -> None:
    for value in every_value(tiny, swept, tmp_path / "run.zarr"):
        shown = Shown(value)
        assert not {"script", "img", "link", "iframe"} & set(shown.elements)
        assert not {"src", "href", "onclick"} & shown.names
        assert "@import" not in shown.html
        assert "url(" not in shown.html
        assert len(shown.html) < 20_000
        # Every table can scroll sideways by itself, so that a narrow cell of a notebook does not.
        assert shown.html.count("<table") == shown.html.count('class="nsp-wide"') >= 1
        assert "background:#" not in shown.html  # the notebook's own paper, light or dark
        assert "nsp-card" not in f"{value} {value!r}"  # the text form stays text


def test_a_model(tiny: nsp.Model) -> None:
    shown = Shown(tiny)
    geometry = tiny.geometry
    assert shown.facts["layers"] == f"{geometry.n_layers}, residual stream of width {geometry.d_model}"
    assert shown.facts["heads"] == f"{HEADS} of width {geometry.head_dim} ({KV_HEADS} key/value)"
    assert shown.facts["weights"] == "float32 on cpu"
    rows = shown.rows("what can be read")
    assert tuple(row["component"] for row in rows) == geometry.components()
    k = next(row for row in rows if row["component"] == "k")
    assert (k["layers"], k["units"]) == (str(geometry.n_layers), f"{KV_HEADS} heads")
    assert repr(tiny).startswith("Model(")


def test_a_site_says_what_is_left_out() -> None:
    shown = Shown(nsp.Site.parse("z[2:8][3] @ subject,-1"))
    assert shown.facts["layers"] == "2:8"
    assert shown.facts["heads"] == "3"
    assert shown.facts["positions"] == "subject,-1"
    whole = Shown(nsp.Site.parse("mlp_neurons[*]")).facts
    assert (whole["layers"], whole["neurons"], whole["positions"]) == (
        "every layer",
        "all neurons as a whole",
        "every position",
    )
    assert Shown(nsp.Site.parse("mlp_neurons[*][*]")).facts["neurons"] == "each neuron apart"
    assert "layers" not in Shown(nsp.Site.parse("logits @ last")).facts


def test_a_prompt_shows_its_tokens_and_marks_its_spans(tiny: nsp.Model) -> None:
    prompt = tiny.encode("a b c d", spans={"middle": "b c"})
    shown = Shown(prompt)
    assert shown.tokens == [f"{text}{number}" for number, text in enumerate(prompt.token_texts)]
    assert shown.html.count('nsp-marked"') == len(prompt.span("middle"))
    assert shown.facts["middle"] == ", ".join(map(str, prompt.span("middle")))


def test_a_trace_shows_its_results(swept: nsp.Trace) -> None:
    shown = Shown(swept)
    rows = {row["variable"]: row for row in shown.rows("results")}
    for name, array in swept.results.data_vars.items():
        lowest, highest = float(array.min()), float(array.max())
        value = f"{lowest:.4g}" if array.ndim == 0 else f"{lowest:.4g} to {highest:.4g}"
        assert rows[name]["value"] == value
    change = swept.results["change_norm"]
    where = change.where(change == change.max(), drop=True)
    text = repr(where["token_text"].item())
    assert (
        rows["change_norm"]["largest at"]
        == f"layer {where['layer'].item()}, position {where['position'].item()}, {text}"
    )
    (receipt,) = shown.rows("what each intervention did")
    assert receipt["branches"] == str(swept.receipts[0].branches)
    assert receipt["exactly unchanged"] == str(swept.receipts[0].unchanged)
    assert receipt["since"] == swept.receipts[0].reason


def test_a_trace_before_it_runs_and_with_several_recordings(tiny: nsp.Model) -> None:
    with tiny.trace(["a b", "a c", "b c", "c d"]) as t:
        t.record("resid_post[*]", "z[1]")
        t.scale("mlp_out[0]", 2.0)
        before = Shown(t)
        assert before.notes == ["not run yet: it runs when its with block ends"]
        assert "results" not in before.captions
        assert "and 1 more prompts" in before.text
    rows = {row["variable"]: row for row in Shown(t).rows("results")}
    layers, heads, width, tokens = 2, HEADS, 32, len(tiny.encode("a b"))
    assert rows["resid_post"]["dims"] == f"prompt 4 x layer {layers} x position {tokens} x neuron {width}"
    assert rows["z"]["dims"] == f"prompt 4 x layer 1 x position {tokens} x head {heads} x neuron {width // heads}"


def test_values_that_are_missing_are_said() -> None:
    from nsp.results import overview

    data = xr.Dataset({"effect": (("layer",), np.array([1.0, np.nan, -3.0])), "none": (("layer",), np.full(3, np.nan))})
    rows = {row[0]: row for row in overview(data).rows}
    assert rows["effect"][1:3] == ("-3 to 1, 1 of 3 without a finite value", "layer 2")
    assert rows["none"][1:3] == ("3 of 3 without a finite value", None)


def test_a_plan_shows_what_it_states_and_what_it_costs(tiny: nsp.Model) -> None:
    with tiny.trace("a b c d", path="plain") as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor="a b x d"))
        t.measure(nsp.logit_diff("a", "b"))
        plan = t.dry_run()
    shown = Shown(plan)
    assert shown.facts["plan"] == plan.hash[:12]
    assert shown.facts["swept"] == "patch resid_post[*] @ *"
    assert shown.facts["metrics"] == "logit_diff"
    assert plan.schedule is not None
    (row,) = shown.rows("how it will run")
    assert list(row.values()) == plan.schedule.rows()[0]
    assert shown.notes == [f"{one.title}: plain path, since {one.reason}" for one in plan.schedule.estimates]
    many = Plan(
        "x", {"name": "m"}, {"layers": [0, 1, 2, 5], "pairs": [{"name": f"p{n}"} for n in range(9)], "memory": None}
    )
    facts = Shown(many).facts
    assert facts["layers"] == "0-2, 5"
    assert facts["pairs"] == "p0, p1, p2, p3, p4, p5 and 3 more"
    assert "memory" not in facts


def test_receipts_are_still_a_tuple(swept: nsp.Trace) -> None:
    receipts = swept.receipts
    assert isinstance(receipts, Receipts)
    assert receipts == tuple(receipts)
    assert repr(receipts) == repr(tuple(receipts))
    assert isinstance(receipts[0], Receipt)
    assert str(receipts[0]).startswith("patch resid_post[*] @ *: fired")
    assert Shown(receipts[0]).rows("what") == Shown(receipts).rows("what")


def test_a_circuit_shows_its_strongest_units_and_says_how_many_there_are() -> None:
    units = tuple(CircuitUnit(layer, -1, unit, (-1.0) ** unit * (1 + unit)) for layer in (3, 4) for unit in range(15))
    circuit = Circuit(units, prompt="a", target="b", counterfactual="c", metric="logit_diff", metric_value=2.0)
    shown = Shown(circuit)
    assert shown.captions[0] == f"strongest units (the first {MOST_ROWS} of 30)"
    rows = shown.rows("strongest")
    assert [(int(row["layer"]), int(row["neuron"]), float(row["contribution"])) for row in rows] == [
        (unit.layer, unit.unit, unit.value) for unit in circuit.units[:MOST_ROWS]
    ]
    assert [row["units"] for row in shown.rows("by layer")] == ["15", "15"]
    assert shown.facts["answer"] == "'b' rather than 'c'"
    assert shown.facts["metric"] == "logit_diff 2"
    assert shown.facts["units"] == "30 neurons of mlp_neurons, in layers 3-4"


def test_an_opened_run_and_its_results(tiny: nsp.Model, tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    tree = activation_patching(tiny, nsp.pair(clean="a b c", corrupt="a x c", answer="a", distractor="b"), out=store)
    run = nsp.open_run(store)
    shown = Shown(run)
    assert shown.facts["state"] == "complete, 1 of 1 units committed"
    assert run.header["extra"]["headline"] in shown.text
    assert not shown.notes
    run.header = {**run.header, "state": "running"}
    assert Shown(run).notes == ["this run is not complete (running): what was not computed reads as NaN"]
    summary = tree.nsp.summary()
    text = Shown(tree.nsp).text
    assert all(line in text for line in summary.lines)
    assert [caption.split(" (the first")[0] for caption in Shown(summary).captions] == [
        table.title for table in summary.tables
    ]
    assert (
        tree["effects/resid_post"].to_dataset().nsp._repr_html_() is None
    )  # one group is no run: its text form is shown


def test_hostile_text_stays_text(tiny: nsp.Model) -> None:
    table = Table(HOSTILE, (HOSTILE, "n"), [(HOSTILE, 1)])
    cards = [
        card(HOSTILE, HOSTILE, facts=[(HOSTILE, HOSTILE)], lines=[HOSTILE], notes=[HOSTILE], tables=[table]),
        card("x", facts=[("tokens", Tokens([HOSTILE, "\n\t\x1b"], {0: HOSTILE}))]),
        Circuit(
            (CircuitUnit(0, 0, 0, 1.0, HOSTILE),), prompt=HOSTILE, target=HOSTILE, provenance={HOSTILE: HOSTILE}
        )._repr_html_(),
        Plan(HOSTILE, {"name": HOSTILE}, {HOSTILE: [HOSTILE]})._repr_html_(),
        Receipt(HOSTILE, HOSTILE, 1, 1, 0, (0,), (0,), 1, 1.0, 1.0, "plain", HOSTILE)._repr_html_(),
        Summary(HOSTILE, (HOSTILE,), (SummaryTable(HOSTILE, (HOSTILE,), ((HOSTILE,),)),))._repr_html_(),
    ]
    with tiny.trace("a b", spans={}) as t:
        t.record("resid_post[0]")
    t.results.attrs["prompts"] = [HOSTILE]
    for html in [*cards, t._repr_html_()]:
        shown = Shown(html)
        assert "script" not in shown.elements
        assert shown.names <= {"class", "scope", "role", "tabindex", "aria-label", "title"}
    assert Shown(cards[0]).tables[0] == [[HOSTILE, HOSTILE]]
    assert Shown(cards[1]).tokens == [f"{HOSTILE}0", "\\n\\t\\x1b1"]


def test_numbers_in_cells() -> None:
    shown = Shown(card("x", tables=[Table("t", ("name", "value"), [("a", 1.23456), ("b", None), ("c", float("nan"))])]))
    assert [row["value"] for row in shown.rows("t")] == ["1.235", "–", "NaN"]
    assert ranges([3, 1, 2, 2, 7]) == "1-3, 7"
    assert ranges([]) == ""
    long = Shown(card("x", facts=[("text", "a" * 5000)]))
    assert len(long.facts["text"]) == 400


def test_results_answer_without_importing_experiments() -> None:
    """``.nsp`` is there once a model or a store can be opened, and takes torch only when it is used."""
    code = (
        "import sys, nsp, xarray; nsp.open_run; assert 'nsp.experiments' not in sys.modules and 'torch' not in sys.modules\n"
        "results = xarray.Dataset().nsp; assert type(results).__name__ == 'Results', results\n"
        "assert type(xarray.DataTree().nsp) is type(results)"
    )
    subprocess.run(
        [sys.executable, "-W", "error::xarray.core.extensions.AccessorRegistrationWarning", "-c", code], check=True
    )


NOTEBOOK = """
import time
from nsp.progress import branch_bar
with branch_bar(40, shown={shown}) as advance:
    for done in range(1, 41):
        if advance is not None:
            advance(done, 40)
        time.sleep({pause})
"""


def ran(code: str) -> list[Any]:
    """The outputs of one cell in a kernel, as a saved notebook has them."""
    import nbclient
    from nbformat import v4

    notebook = v4.new_notebook(cells=[v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    return list(notebook.cells[0].outputs)


def test_a_notebook_shows_one_bar_that_renews_itself() -> None:
    (output,) = ran(NOTEBOOK.format(shown=None, pause=0.05))
    assert output.output_type == "display_data"
    assert re.search(r"branches .*40/40", output.data["text/plain"])
    assert "40/40" in re.sub("<[^>]*>", "", output.data["text/html"])
    assert "script" not in output.data["text/html"]
    assert len(output.data["text/html"]) < 2000


def test_a_notebook_shows_no_bar_for_what_is_over_in_a_moment_or_unwanted() -> None:
    code = NOTEBOOK.format(shown=None, pause=0) + NOTEBOOK.format(shown=False, pause=0.05)
    assert ran(code) == []


def test_no_bar_outside_a_notebook_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    with branch_bar(3) as advance:
        assert advance is None
    with branch_bar(3, shown=True) as advance:
        assert advance is not None
        advance(3, 3)
    with branch_bar(0, shown=True) as advance:
        assert advance is None
    assert "\x1b" not in capfd.readouterr().err
