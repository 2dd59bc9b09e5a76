"""Selectors: what they parse to, that they print back, and what their errors say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nsp.errors import InputError
from nsp.sites import COMPONENTS, Selection, Site, Slice, component

INDICES = st.integers(-40, 40)
BOUNDS = st.none() | INDICES
SLICES = st.builds(Slice, BOUNDS, BOUNDS, st.none() | INDICES.filter(bool))
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True)
PATHS = st.from_regex(r"module:[a-z_]{1,5}(\.[a-z0-9_]{1,5}){0,3}", fullmatch=True)


def selections(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Selection]:
    listed = st.lists(items, min_size=1, max_size=4).map(lambda found: Selection(tuple(found)))
    return st.just(Selection(everything=True)) | listed


@st.composite
def sites(draw: st.DrawFn) -> Site:
    name = draw(st.sampled_from(sorted(COMPONENTS)) | PATHS)
    known = component(name)
    layers = draw(st.none() | selections(INDICES | SLICES)) if known.layered else None
    units = draw(st.none() | selections(INDICES | SLICES)) if known.unit else None
    return Site(name, layers, units, draw(st.none() | selections(INDICES | SLICES | NAMES)))


@settings(deadline=None)
@given(sites())
def test_a_site_prints_back(site: Site) -> None:
    assert Site.parse(str(site)) == site


@settings(deadline=None)
@given(sites(), st.data())
def test_white_space_between_the_parts_means_nothing(site: Site, data: st.DataObject) -> None:
    text = str(site)
    for mark in "[],@:":
        if mark != ":" or not site.component.startswith("module:"):
            text = text.replace(mark, data.draw(st.sampled_from([mark, f" {mark}", f"{mark} ", f"\t{mark} "])))
    assert Site.parse(f" {text} ") == site


@settings(deadline=None)
@given(st.lists(INDICES | SLICES, min_size=1, max_size=4), st.integers(1, 40))
def test_resolve_agrees_with_python(items: list[int | Slice], size: int) -> None:
    axis = list(range(size))
    expected: list[int] = []
    for item in items:
        try:
            part = axis[item.start : item.stop : item.step] if isinstance(item, Slice) else [axis[item]]
        except IndexError:
            part = []
        if not part:
            with pytest.raises(InputError, match=r"out of range|selects nothing"):
                Selection(tuple(items)).resolve(size, what="layer")
            return
        expected += part
    assert Selection(tuple(items)).resolve(size, what="layer") == tuple(dict.fromkeys(expected))


@settings(deadline=None)
@given(st.text(max_size=30) | st.text("zq[]@*,:-0123456789 last", max_size=20))
def test_any_text_parses_or_is_an_input_error(text: str) -> None:
    try:
        site = Site.parse(text)
    except InputError:
        return
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("resid_post[10] @ 9", ("resid_post", "10", None, "9")),
        ("mlp_neurons[12][501,733] @ -1", ("mlp_neurons", "12", "501,733", "-1")),
        ("attn_out[*]", ("attn_out", "*", None, None)),
        ("resid_post[2:8] @ subject", ("resid_post", "2:8", None, "subject")),
        ("module:model.layers.3.mlp.gate_proj[5] @ last", ("module:model.layers.3.mlp.gate_proj", None, "5", "last")),
        ("logits @ -1", ("logits", None, None, "-1")),
        ("embed@subject,-1", ("embed", None, None, "subject,-1")),
        ("z[::2][*]", ("z", "::2", "*", None)),
        ("k", ("k", None, None, None)),
    ],
)
def test_the_grammar(text: str, parts: tuple[str | None, ...]) -> None:
    site = Site.parse(text)
    found = (site.component, site.layers, site.units, site.positions)
    assert tuple(None if part is None else str(part) for part in found) == parts


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("resid_pst[1]", 1, "did you mean 'resid_post'"),
        ("Resid_Post[1]", 1, "did you mean 'resid_post'"),
        ("", 1, "expected a component"),
        ("resid_post[1x] @ 9", 12, "expected an index"),
        ("resid_post[1.5]", 12, "expected an index"),
        ("resid_post[] @ 2", 12, "expected an index"),
        ("resid_post[1,*]", 14, "stands alone"),
        ("resid_post[*,1]", 12, "stands alone"),
        ("resid_post[1][2]", 14, r"write resid_post\[layers\] @ positions"),
        ("z[1][2][3]", 8, r"write z\[layers\]\[heads\]"),
        ("logits[3]", 7, "write logits @ positions"),
        ("resid_post[last]", 12, "only positions"),
        ("resid_post[1", 13, "expected ',' or ']'"),
        ("resid_post[1] @", 16, "name of a span"),
        ("resid_post[1]]", 14, "expected"),
        ("z[::0]", 3, "cannot be 0"),
        ("z[1] @ 2 3", 10, "expected ',' or the end"),
        ("module:[3]", 1, "names no submodule"),
        ("module:a..b", 1, "names no submodule"),
    ],
)
def test_errors_point_at_the_column(text: str, column: int, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Site.parse(text)
    message, shown, caret = str(caught.value).split("\n")
    assert message.startswith(f"selector, column {column}: ")
    assert shown == f"    {text}"
    assert caret == " " * (3 + column) + "^"


def test_control_characters_do_not_move_the_caret() -> None:
    with pytest.raises(InputError) as caught:
        Site.parse("z[1\n\0]")
    assert str(caught.value).split("\n")[1:] == ["    z[1??]", "        ^"]


def test_a_selector_is_text() -> None:
    with pytest.raises(InputError, match="not int"):
        Site.parse(3)  # type: ignore[arg-type]


def test_index_out_of_range_names_the_valid_range() -> None:
    with pytest.raises(InputError, match=r"^layer of resid_post\[40\]: 40 is out of range; valid is 0 to 29 \(or -30 "):
        Selection.of(40).resolve(30, what="layer of resid_post[40]")
    with pytest.raises(InputError, match="40:50 selects nothing"):
        Selection.of("1,40:50").resolve(30, what="layer")
    with pytest.raises(InputError, match="only 0"):
        Selection.of(1).resolve(1, what="layer")
    with pytest.raises(InputError, match="none to select"):
        Selection.of("*").resolve(0, what="head")


def test_names_resolve_where_the_axis_has_them() -> None:
    names = {"subject": (3, 4), "last": (9,)}
    assert Selection.of("subject,-1,3").resolve(10, what="position", names=names) == (3, 4, 9)
    with pytest.raises(InputError, match="no span 'object'; known are subject, last"):
        Selection.of("object").resolve(10, what="position", names=names)
    with pytest.raises(InputError, match="only positions have names"):
        Selection.of("subject").resolve(10, what="layer")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("all", "*"),
        ("*", "*"),
        (["*"], "*"),
        (3, "3"),
        ([1, "2:4", "subject"], "1,2:4,subject"),
        (slice(1, None, 2), "1::2"),
        (slice(None, 3, 1), ":3"),
        (range(3), "0,1,2"),
    ],
)
def test_selections_from_plain_values(value: Any, text: str) -> None:
    assert str(Selection.of(value)) == text


@pytest.mark.parametrize("value", [True, 1.5, [], [1, "*"], "1;2", "", None])
def test_what_is_no_selection(value: Any) -> None:
    with pytest.raises(InputError):
        Selection.of(value)


def test_sites_are_checked_where_they_are_made() -> None:
    everything = Selection(everything=True)
    with pytest.raises(InputError, match="logits has no layers"):
        Site("logits", layers=everything)
    with pytest.raises(InputError, match="no heads or neurons"):
        Site("resid_post", everything, everything)
    with pytest.raises(InputError, match="only positions"):
        Site("z", Selection(("subject",)))
    with pytest.raises(InputError, match="unknown component"):
        Site("zz")
    with pytest.raises(InputError, match="span name"):
        Selection(("a b",))


def test_with_changes_some_parts() -> None:
    site = Site.parse("z[1][2] @ 3")
    assert str(site.with_(units=None)) == "z[1] @ 3"
    assert str(site.with_(layers="2:4", positions="subject")) == "z[2:4][2] @ subject"
    assert site.with_() == site
    assert str(Site.parse("z").with_(units=0)) == "z[*][0]", "a unit is written after a layer"


@settings(deadline=None)
@given(NAMES)
def test_unknown_components_are_refused(name: str) -> None:
    assume(name not in COMPONENTS)
    with pytest.raises(InputError, match="unknown component"):
        component(name)
