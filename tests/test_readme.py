"""The README's examples run as they stand, and its figures are those that they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nsp.cli.app import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's first command leaves behind, on the CPU in float32."""
    path = tmp_path_factory.mktemp("readme") / "runs" / "ioi.zarr"
    recipe = str(ROOT / "recipes" / "ioi.yaml")
    assert main(["run", recipe, "--device", "cpu", "--dtype", "float32", "--no-progress", "--out", str(path)]) == 0
    return path


def test_the_figures(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (_, example), (printed,) = blocks("python"), blocks("text")
    monkeypatch.chdir(store.parents[1])
    exec(compile(example, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert NUMBER.sub("_", said) == NUMBER.sub("_", printed)
    # Another CPU adds in another order.
    assert list(map(float, NUMBER.findall(said))) == pytest.approx(list(map(float, NUMBER.findall(printed))), abs=2e-3)


def test_the_strongest_cells(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(store)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\n +15 +9 +' Mary' +1\.013 ", said)
    assert "146 counterfactuals" in said
    assert "274 are exactly zero" in said


def test_the_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert "logit_diff" in capsys.readouterr().out


def test_the_recipe_table_is_whole() -> None:
    listed = set(re.findall(r"^\| \[[^]]+\]\(recipes/([^)]+)\)", README, flags=re.MULTILINE))
    assert listed == {path.name for path in (ROOT / "recipes").glob("*.yaml")}


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert "docs/images/ioi.png" in links
    assert [link for link in links if not (ROOT / link).exists()] == []
