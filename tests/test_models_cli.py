"""`nsp models list` and `nsp models pull`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from nsp.cli.models import app
from nsp.errors import InputError
from nsp.models import CATALOGUE

runner = CliRunner()


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_list_shows_every_model_and_what_memory_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    outcome = runner.invoke(app, ["list"])
    assert outcome.exit_code == 0, outcome.output
    for entry in CATALOGUE.values():
        assert entry.alias in outcome.output
        assert entry.hub_id in outcome.output
        assert entry.licence in outcome.output
    assert "weights alone" in outcome.output
    assert "HF_TOKEN" in outcome.output
    line = next(line for line in outcome.output.splitlines() if line.startswith("gpt2 "))
    assert line.split() == ["gpt2", "openai-community/gpt2", "124M", "12", "MIT", "498M", "249M", "124M", "62M", "-"]


def test_list_as_json() -> None:
    rows = {row["alias"]: row for row in json.loads(runner.invoke(app, ["list", "--json"]).stdout)}
    assert set(rows) == set(CATALOGUE)
    assert rows["llama-3.1-8b-inst"]["gated"] is True
    assert rows["gpt2"]["memory_bytes"]["float32"] == 497_759_232
    assert not any(row["on_disk"] for row in rows.values())


def test_list_in_a_pipe_keeps_one_model_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = runner.invoke(app, ["list"]).output.splitlines()
    assert sum(line.split()[:1] == [alias] and "layers" not in line for line in lines for alias in CATALOGUE) == len(
        CATALOGUE
    )
    assert any(line.startswith("mistral-7b ") and "mistralai/Mistral-7B-v0.3" in line for line in lines)


def test_list_on_a_narrow_terminal_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = runner.invoke(app, ["list"]).output
    assert "meta-llama/Llama-3.1-8B-Instruct" in output
    assert "8.03B, 32 layers, Llama 3.1 (gated)" in output


def test_pull_of_what_has_no_name() -> None:
    outcome = runner.invoke(app, ["pull", "gpt22"])
    assert isinstance(outcome.exception, InputError)
    assert "gpt2" in str(outcome.exception)
