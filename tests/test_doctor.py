"""`nsp doctor`: what is wrong is named, with what to do about it, and the exit code says so."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nsp.cli import doctor
from nsp.cli.app import main


def test_a_machine_that_can_run_nsp(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--offline"]) == 0
    said = capsys.readouterr().out
    for word in ("Python", "torch", "transformers", "nnsight", "CPU", "memory", "cache", "smollm2", "nsp can run here"):
        assert word in said


def test_a_version_that_nsp_does_not_allow_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "5.23.0" if name == "transformers" else true(name))
    assert main(["doctor", "--offline"]) == 1
    said = capsys.readouterr().out
    assert "1 problem(s)" in said
    assert "5.23.0" in said
    assert "pip install -c constraints.txt" in said


def test_a_cache_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NSP_CACHE", str(tmp_path / "file" / "cache"))
    assert main(["doctor", "--offline"]) == 1
    assert "set NSP_CACHE" in capsys.readouterr().out


def test_servers_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("NDIF_HOST", address)
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        assert [one.state for one in doctor.ndif()] == ["ok"]
        assert next(doctor.hub()).state == "ok"
    assert [one.state for one in doctor.ndif()] == ["problem"]
    found = next(doctor.hub())
    assert (found.state, "does not answer" in found.found) == ("note", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in next(doctor.hub()).found
