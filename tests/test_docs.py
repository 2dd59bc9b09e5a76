"""The documentation: every page is in the navigation, links lead somewhere, code runs, references are complete, printed errors are real."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML

import nsp
from nsp.cli.app import app, main
from nsp.experiments.kinds import RECIPES
from nsp.sites import COMPONENTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
GUIDES = ["quickstart", "concepts", "stores", "from-nnsight", "from-transformerlens", "from-pyvene"]
PEERS = {"TransformerLens": "transformer_lens", "pyvene": "pyvene"}
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
_BLOCK = re.compile(r'^```(\w+)(?: title="(\w+)[^"]*")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


@pytest.fixture(scope="module")
def generators() -> Iterator[Callable[[str], Any]]:
    """The modules of docs/generators, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "generators"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def generated(generators: Callable[[str], Any]) -> dict[str, str]:
    pages: dict[str, str] = generators("pages").generated_pages()
    return pages


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/ioi.zarr, as the pages have it."""
    folder = tmp_path_factory.mktemp("docs")
    out = ["--out", str(folder / "runs" / "ioi.zarr")]
    assert main(["run", "ioi", "--device", "cpu", "--dtype", "float32", "--no-progress", *out]) == 0
    return folder


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[tuple[str, str]]:
    """(title, text) of a page's fenced blocks in a language."""
    return [(match[2] or "", match[3]) for match in _BLOCK.finditer(text_of(page)) if match[1] == language]


def navigation() -> list[str]:
    def leaves(item: Any) -> Iterator[str]:
        if isinstance(item, str):
            yield item
        for inner in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            yield from leaves(inner)

    return list(leaves(YAML(typ="safe").load(ROOT / "mkdocs.yml")["nav"]))


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_page_is_in_the_navigation_once(generated: dict[str, str]) -> None:
    nav = navigation()
    assert sorted(nav) == sorted({*PAGES, *generated})


def test_nothing_is_fetched() -> None:
    settings = YAML(typ="safe").load(ROOT / "mkdocs.yml")
    assert settings["theme"]["font"] is False
    assert not {"extra_javascript", "repo_url"} & settings.keys()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str, generators: Callable[[str], Any], generated: dict[str, str]) -> None:
    pages = generators("pages")
    raw = text_of(page)
    for target in _LINK.findall(raw):
        if "://" not in target and not target.startswith("#"):
            path = (DOCS / page).parent / target.partition("#")[0]
            assert path.exists() or target.partition("#")[0] in generated, f"{page}: {target}"
    for target in _LINK.findall(pages.with_site_links(raw, f"docs/{page}")):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        place = place or page
        if place.endswith(".md"):
            text = generated.get(place) or text_of(place)
            assert not anchor or anchor in slugs(text), f"{page}: {target}"


@pytest.mark.parametrize("name", GUIDES)
def test_the_code_of_a_guide_runs(
    name: str, smollm2: nsp.Model, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setattr(nsp, "load", lambda alias: smollm2 if alias == "smollm2" else pytest.fail(alias))
    scope: dict[str, Any] = {}
    for number, (title, code) in enumerate(blocks(f"{name}.md", "python")):
        if title in PEERS and importlib.util.find_spec(PEERS[title]) is None:
            continue
        where = f"docs/{name}.md, block {number}"
        # nnsight reads the source of what it traces.
        linecache.cache[where] = (len(code), None, code.splitlines(keepends=True), where)
        exec(compile(code, where, "exec"), scope)
    said = capsys.readouterr().out
    for _, printed in blocks(f"{name}.md", "text") if name == "quickstart" else ():
        expected = list(map(float, _NUMBER.findall(printed)))
        assert expected
        assert list(map(float, _NUMBER.findall(said)[: len(expected)])) == pytest.approx(expected, abs=2e-3)
    if name == "from-nnsight":  # both columns print the same number, one after the other
        numbers = list(map(float, _NUMBER.findall(said)))
        assert len(numbers) == 4
        assert numbers[::2] == pytest.approx(numbers[1::2], abs=1e-3)


def test_the_recipe_reference_has_every_key(generated: dict[str, str]) -> None:
    text = generated["recipe-reference.md"]
    sections = dict(re.findall(r"^## ([\w -]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    shared = sections["Keys of every recipe"]
    for kind, recipe in RECIPES.items():
        assert f"`{kind}`" in shared
        missing = [key for key in recipe.model_fields if f"| `{key}` |" not in sections[kind] + shared]
        assert not missing, f"{kind}: {missing}"
    for name in re.findall(r"\]\(#(\w+)\)", text):
        assert name in slugs(text), name


def test_a_key_with_its_type_default_and_meaning(generated: dict[str, str]) -> None:
    row = next(line for line in generated["recipe-reference.md"].splitlines() if line.startswith("| `seed` |"))
    assert row == "| `seed` | integer (≥ 0, < 4294967296) | `0` | Seed for everything random in the run. |"


def test_the_command_reference_has_every_option(generators: Callable[[str], Any], generated: dict[str, str]) -> None:
    text = generated["command-reference.md"]
    found = dict(generators("command_reference").commands(typer.main.get_command(app)))
    assert {"nsp run", "nsp models pull", "nsp data pull"} <= found.keys()
    sections = dict(re.findall(r"^## ([\w -]+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == found.keys()
    for name, command in found.items():
        options = [option for param in command.params for option in param.opts if option.startswith("--")]
        assert not [option for option in options if option not in sections[name] and option != "--help"], name


def test_the_python_reference_has_every_public_name(
    generators: Callable[[str], Any], generated: dict[str, str]
) -> None:
    api = generators("api_reference")
    for name, page in api.PAGES.items():
        text = generated[f"api/{name}.md"]
        for full in api.listed(page):
            assert api.resolve(full).__doc__, full
            shown = (f"::: {api.home(full)}\n", f"{{ #{api.home(full)} ", f"][{api.home(full)}]")
            assert any(form in text for form in shown), full
    assert "heading: nsp.load\n" in generated["api/nsp.md"]
    # The package of a kind can be called, and its entry is the package.
    assert "::: nsp.experiments.bias_scan\n" in generated["api/experiments.md"]


def test_concepts_name_every_component() -> None:
    first = text_of("concepts.md").partition("## Intervention")[0]
    assert [name for name in COMPONENTS if f"`{name}`" not in first] == []


def test_the_errors_that_troubleshooting_prints_are_real(smollm2: nsp.Model) -> None:
    def trace(state: Callable[[nsp.Trace], object]) -> Callable[[], object]:
        def run() -> None:
            with smollm2.trace(CORRUPT) as t:
                state(t)

        return run

    def swept_and_recorded(t: nsp.Trace) -> None:
        t.sweep(nsp.patch("resid_post[*] @ *", donor=CLEAN))
        t.record("z[1]")

    causes: list[Callable[[], object]] = [
        trace(lambda t: t.measure(nsp.logit_diff(" Mary", " Jonathanson"))),
        trace(lambda t: t.patch("resid_post[10] @ 9", donor="A shorter text")),
        trace(lambda t: t.patch("resid_post[3] @ subject", donor=CLEAN)),
        trace(lambda t: t.patch("resid_pst[10] @ 9", donor=CLEAN)),
        trace(lambda t: t.patch("resid_post[40] @ 9", donor=CLEAN)),
        trace(lambda t: t.patch("module:model.layers.3.mlp.gat @ -1", donor=CLEAN)),
        trace(lambda t: t.ablate("logits")),
        trace(swept_and_recorded),
        lambda: nsp.load("smollm"),
        lambda: nsp.open_run("runs/none.zarr"),
    ]
    said = []
    for cause in causes:
        with pytest.raises(nsp.NspError) as caught:
            cause()
        said.append(str(caught.value).splitlines()[0])
    assert sorted(text.strip() for _, text in blocks("troubleshooting.md", "text")) == sorted(said)
