"""Recipes on a server: the same store, one that goes on after the server died, and what the command line says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engine_models as tiny
import pytest
from ndif_server import Double, checkpoint, start_double

from nsp.cli.app import main
from nsp.experiments.activation_patching.experiment import ActivationPatching
from nsp.stores import diff, open_run

COMPONENTS = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint and a recipe of six units of work."""
    made = tmp_path_factory.mktemp("run")
    checkpoint(made / "weights")
    recipe = {
        "kind": "activation-patching",
        "model": {"name": "./weights", "dtype": "float32"},
        "pairs": [
            {"clean": tiny.text(tiny.CLEAN), "corrupt": tiny.text(tiny.CORRUPT), "answer": "w7", "distractor": "w9"}
        ],
        "components": COMPONENTS,
        "metric": "logit_diff",
    }
    (made / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(made / "recipe.yaml"), "--out", str(made / "local.zarr"), "--no-progress"]) == 0
    return made


def assert_same(expected: str, found: str) -> None:
    for variable in diff(expected, found).variables:
        # A recovery is in percent.
        assert variable.largest <= (1e-3 if "recovery_" in variable.where else 1e-5), variable
        assert not variable.unmatched, variable


def backend(folder: Path, double: Double, **options: Any) -> str:
    return json.dumps({"kind": "ndif", "host": double.address, "model": str(folder / "weights"), **options})


def run(folder: Path, out: Path, where: str, *more: str) -> int:
    return main(command(folder, out, where, *more))


def command(folder: Path, out: Path, where: str, *more: str) -> list[str]:
    return ["run", str(folder / "recipe.yaml"), "--out", str(out), "--backend", where, "--no-progress", *more]


def test_a_recipe_gives_the_local_store(
    folder: Path, double: Double, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "remote.zarr"
    assert run(folder, out, backend(folder, double)) == 0
    assert_same(str(folder / "local.zarr"), str(out))
    header = open_run(str(out)).header
    assert header["model"]["weights_hash"].startswith("remote:")
    jobs = header["extra"]["jobs"]
    assert {job["unit"] for job in jobs} == set(range(len(COMPONENTS)))
    capsys.readouterr()
    assert main(["jobs", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{len(jobs)} jobs, " in said
    assert jobs[0]["id"] in said


def test_local_sim_gives_the_local_store(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "sim.zarr", "local-sim") == 0
    assert_same(str(folder / "local.zarr"), str(tmp_path / "sim.zarr"))


def test_a_server_that_dies_in_the_middle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start_double(tmp_path)
    out, where = tmp_path / "remote.zarr", backend(folder, first, retries=1)
    plain = ActivationPatching.compute

    def third_kills(self: ActivationPatching, unit: Any, stored: Any, progress: Any = None) -> Any:
        if unit.index == 2:
            first.fault("die")
        return plain(self, unit, stored, progress)

    monkeypatch.setattr(ActivationPatching, "compute", third_kills)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    try:
        assert run(folder, out, where) == 1
        said = capsys.readouterr().err
        assert "finished work is kept in" in said
        assert "--resume" in said
        assert open_run(str(out)).state == "running"
        monkeypatch.undo()
        second = first.again()
    finally:
        first.stop()
    try:
        assert run(folder, out, where, "--resume") == 0
        assert "found 2 of 6 units of work finished" in capsys.readouterr().err
        # The second process ran what was left and nothing else.
        jobs = open_run(str(out)).header["extra"]["jobs"]
        assert [job["unit"] for job in jobs] == sorted(job["unit"] for job in jobs)
    finally:
        second.stop()
    assert_same(str(folder / "local.zarr"), str(out))


def test_status_shows_models_and_versions(
    folder: Path, double: Double, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path / "deployed.zarr", backend(folder, double)) == 0
    capsys.readouterr()
    short = double.address.replace("http", "ndif")
    assert main(["status", "--backend", short]) == 0
    said = capsys.readouterr().out
    assert f"server {double.address}" in said
    assert "RUNNING" in said
    assert "nnsight" in said
    assert "python" in said
    assert "differs" not in said


def test_a_failed_job_is_one_line_and_the_servers_trace_under_debug(
    folder: Path, double: Double, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "failed.zarr"
    for more in ([], ["--debug"]):
        double.fault("fail")
        assert main([*more, *command(folder, out, backend(folder, double))]) == 1
        said = capsys.readouterr().err
        assert "the job failed on the server: RuntimeError: out of memory" in said
        assert ("a line of the server's own" in said) == bool(more)


def test_status_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--backend", "ndif://127.0.0.1:9"]) == 1
    assert "no connection to the server http://127.0.0.1:9" in capsys.readouterr().err
    assert main(["status", "--backend", "local"]) == 2


def test_jobs_of_a_local_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", str(folder / "local.zarr")]) == 0
    assert "no job was sent" in capsys.readouterr().err
