"""Ray workers: the store is the same whoever computed what, also when one of them is killed on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_models as tiny
import psutil
import pytest
import torch
from ndif_server import Double, checkpoint, start_double

import nsp
from nsp.backends.options import backend_options
from nsp.cli.app import main
from nsp.errors import InputError, NspError
from nsp.experiments import ray_workers, registry, runner
from nsp.experiments.experiment import Experiment
from nsp.recipe import load_recipe_file
from nsp.stores import diff, open_run

ray = pytest.importorskip("ray")

COMPONENTS = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "mlp_neurons"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers look for modules in the driver's directory first, and a clone holds nsp's sources, not the package."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten units of work on a tiny model."""
    folder = tmp_path_factory.mktemp("ray")
    weights = checkpoint(folder / "weights")
    made = {
        "kind": "activation-patching",
        "model": {"name": str(weights), "device": "cpu", "dtype": "float32"},
        "pairs": [
            {"clean": tiny.text(tiny.CLEAN), "corrupt": tiny.text(tiny.CORRUPT), "answer": "w7", "distractor": "w9"}
        ],
        "components": COMPONENTS,
        "metric": "logit_diff",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(made))
    return path


def prepared(recipe: Path, backend: str) -> tuple[dict[str, Any], Experiment[Any]]:
    kinds = {kind: one.recipe_class for kind, one in registry.EXPERIMENTS.items()}
    item = load_recipe_file(recipe, [f"backend={backend}"], kinds=kinds)[0]
    options = item.recipe.model
    model = nsp.load(options.name, **options.model_dump(exclude={"name"}))
    return item.resolved, registry.EXPERIMENTS[item.recipe.kind](model, item.recipe)


@pytest.fixture(scope="module")
def expected(recipe: Path) -> Path:
    """The store of one process, with one thread as a worker has: the last digit of a sum depends on their number."""
    place = recipe.parent / "local.zarr"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _, job = prepared(recipe, "local")
        assert len(job.units) == len(COMPONENTS)
        runner.run(job, out=place, progress=False)
    finally:
        torch.set_num_threads(threads)
    return place


def differences(one: Path, other: Path) -> list[tuple[str, float]]:
    """Every variable of two stores that differs, with its largest difference."""
    return [(found.where, found.largest) for found in diff(str(one), str(other)).variables if found.largest]


def workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [one for one in found if "ray::Worker" in " ".join(one.cmdline() or [""])]


def test_two_workers_write_what_one_process_writes(recipe: Path, expected: Path, tmp_path: Path) -> None:
    resolved, job = prepared(recipe, "ray")
    spread = ray_workers.spread_over(resolved, backend_options("ray"))
    runner.run(job, out=tmp_path / "ray.zarr", progress=False, spread=spread)
    assert open_run(str(tmp_path / "ray.zarr")).state == "complete"
    assert not differences(expected, tmp_path / "ray.zarr")


def test_a_killed_worker_is_replaced(
    recipe: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved, job = prepared(recipe, "ray")
    spread = ray_workers.spread_over(resolved, backend_options("ray"))
    killed: list[int] = []

    def murderous(place: str, plan_hash: str, pending: Any, finished: Any, tell: Any) -> None:
        def after(index: int, jobs: list[dict[str, Any]]) -> None:
            if not killed:
                victim = workers()[0]
                killed.append(victim.pid)
                os.kill(victim.pid, signal.SIGKILL)
            finished(index, jobs)

        spread(place, plan_hash, pending, after, tell)

    runner.run(job, out=tmp_path / "ray.zarr", progress=False, spread=murderous)
    assert killed
    assert "a worker died" in capsys.readouterr().err
    assert not differences(expected, tmp_path / "ray.zarr")


@pytest.mark.slow
def test_an_interrupted_run_goes_on(recipe: Path, expected: Path, tmp_path: Path) -> None:
    resolved, job = prepared(recipe, "ray")
    spread = ray_workers.spread_over(resolved, backend_options("ray"))

    def impatient(place: str, plan_hash: str, pending: Any, finished: Any, tell: Any) -> None:
        def after(index: int, jobs: list[dict[str, Any]]) -> None:
            finished(index, jobs)
            raise KeyboardInterrupt

        spread(place, plan_hash, pending, after, tell)

    with pytest.raises(KeyboardInterrupt):
        runner.run(job, out=tmp_path / "ray.zarr", progress=False, spread=impatient)
    assert open_run(str(tmp_path / "ray.zarr")).state == "running"
    assert not ray.is_initialized()
    # Another kind of run may finish it: the plan says nothing of who computes.
    runner.run(prepared(recipe, "local")[1], out=tmp_path / "ray.zarr", progress=False)
    assert not differences(expected, tmp_path / "ray.zarr")


@pytest.fixture
def double(tmp_path: Path) -> Iterator[Double]:
    started = start_double(tmp_path)
    yield started
    started.stop()


def test_workers_drive_a_server(recipe: Path, expected: Path, double: Double, tmp_path: Path) -> None:
    """From the recipe: two workers that hold no weights, and a server that does."""
    inner = {"kind": "ndif", "host": double.address, "model": str(recipe.parent / "weights")}
    where = json.dumps({"kind": "ray", "workers": 2, "inner": inner})
    keys = json.loads(recipe.read_text())
    del keys["model"]["device"]  # the server's own affair
    keys["components"] = COMPONENTS[:2]
    place, out = tmp_path / "recipe.yaml", tmp_path / "ray.zarr"
    place.write_text(json.dumps(keys))
    assert main(["run", str(place), "--out", str(out), "--backend", where, "--no-progress"]) == 0
    stored = open_run(str(out))
    assert stored.state == "complete"
    assert stored.header["model"]["weights_hash"].startswith("remote:")
    jobs = stored.header["extra"]["jobs"]
    assert {job["unit"] for job in jobs} == set(range(2))
    assert all(job["host"] == double.address and job["received"] for job in jobs)
    # The server saw what the store tells, besides what this process asked to make the plan.
    assert len({job["id"] for job in jobs}) == len(jobs) <= len(double.seen())
    compared = diff(str(expected), str(out))
    assert all(variable.largest <= 1e-5 or "recovery_" in variable.where for variable in compared.variables)
    assert {one.where for one in compared.variables} >= {f"effects/{name}/logit_diff" for name in COMPONENTS[:2]}


@pytest.mark.slow
def test_a_worker_that_cannot_start_says_why(recipe: Path, tmp_path: Path) -> None:
    resolved, job = prepared(recipe, "ray")
    broken = {**resolved, "seed": 7, "layers": "0:1"}
    with pytest.raises(NspError, match="a worker made another plan"):
        runner.run(
            job,
            out=tmp_path / "ray.zarr",
            progress=False,
            spread=ray_workers.spread_over(broken, backend_options("ray")),
        )


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'nsp\[ray\]'"):
        ray_workers.spread_over({}, backend_options("ray"))
