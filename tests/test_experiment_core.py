"""The experiment core: a kind in one file runs by recipe, by its door, killed and resumed, on Ray, and in a report."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import engine_models as tiny
import numpy as np
import pytest
import torch
import xarray as xr
from ndif_server import checkpoint
from toy_experiment import StreamLength

import nsp
from nsp.backends.options import backend_options
from nsp.cli.app import main
from nsp.errors import InputError
from nsp.experiments import ray_workers, report_page, runner
from nsp.experiments.experiment import Unit
from nsp.stores import diff, open_run

PROMPTS = [tiny.text(tiny.CLEAN), tiny.text(tiny.CORRUPT), tiny.text([1, 2, 3, 4])]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def model(weights: Path) -> nsp.Model:
    return nsp.load(weights, device="cpu", dtype="float32")


@pytest.fixture
def recipe(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    options = {"name": str(weights), "device": "cpu", "dtype": "float32"}
    path.write_text(json.dumps({"kind": "stream-length", "model": options, "prompts": PROMPTS, "out": "run.zarr"}))
    return path


def hidden_lengths(model: nsp.Model) -> np.ndarray:
    """Length of each layer's output at the last token, (prompt, layer), from the hidden states that transformers returns.

    The last one is left out: transformers gives it after the final norm.
    """
    rows = []
    for text in PROMPTS:
        with torch.no_grad():
            states = model.module(torch.tensor([model.encode(text).token_ids]), output_hidden_states=True).hidden_states
        rows.append([float(state[0, -1].norm()) for state in states[1:-1]])
    return np.array(rows)


def check(tree: xr.DataTree, model: nsp.Model) -> None:
    length = tree["activations/resid_post"]["length"]
    np.testing.assert_allclose(length.values[:, :-1], hidden_lengths(model), rtol=1e-4)
    gains = np.diff(length.values, axis=1)
    assert tree["baseline"]["most"].values.tolist() == (gains.argmax(axis=1) + 1).tolist()


def test_the_kind_is_short() -> None:
    source = Path(inspect.getfile(StreamLength)).read_text()
    assert len(source.splitlines()) <= 60


def test_by_recipe_and_in_a_report(recipe: Path, model: nsp.Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(recipe), "--no-progress"]) == 0
    assert "adds most" in capsys.readouterr().out
    tree = open_run("run.zarr").tree
    check(tree, model)
    assert "length by layer" in report_page({"run.zarr": tree})
    assert main(["show", "run.zarr"]) == 0
    assert main(["rerun", "run.zarr", "--no-progress"]) == 0


def test_by_its_python_door(model: nsp.Model, tmp_path: Path) -> None:
    door: Any = nsp.experiments.stream_length  # type: ignore[attr-defined]
    check(door(model, PROMPTS), model)
    stored = door(model, prompts=PROMPTS, out=tmp_path / "door.zarr", store_dtype="float32", seed=3, memory="1GB")
    check(stored, model)
    parameters = inspect.signature(door).parameters
    assert {"out", "force", "progress", "store_dtype", "memory", "seed"} <= set(parameters)
    assert "prompts: The prompts." in door.__doc__
    with pytest.raises(InputError, match=r"takes no 'promts'; did you mean 'prompts'"):
        door(model, promts=PROMPTS)


def test_killed_between_its_stages_it_goes_on(recipe: Path, model: nsp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    whole = StreamLength.compute

    def until(stop: int) -> Any:
        def compute(self: StreamLength, unit: Unit, stored: Any, progress: Any = None) -> Any:
            if unit.index == stop:
                raise KeyboardInterrupt
            computed.append(unit.index)
            return whole(self, unit, stored, progress)

        return compute

    for stop, code in ((2, 130), (4, 130), (99, 0)):  # within the first stage, within the second one, not at all
        monkeypatch.setattr(StreamLength, "compute", until(stop))
        assert main(["run", str(recipe), "--no-progress"]) == code
    assert computed == [0, 1, 2, 3, 4, 5]
    check(open_run("run.zarr").tree, model)


def test_two_ray_workers_write_what_one_process_writes(recipe: Path, model: nsp.Model) -> None:
    pytest.importorskip("ray")
    prepared = StreamLength(model, StreamLength.recipe_class.model_validate(json.loads(recipe.read_text())))
    spread = ray_workers.spread_over(prepared.recipe.model_dump(mode="json"), backend_options("ray"))
    runner.run(prepared, out="ray.zarr", progress=False, spread=spread)
    runner.run(prepared, out="local.zarr", progress=False)
    found = diff("local.zarr", "ray.zarr")
    assert found.same_numbers, str(found)
    check(open_run("ray.zarr").tree, model)


def test_a_unit_never_runs_before_what_it_needs(model: nsp.Model, recipe: Path) -> None:
    prepared = StreamLength(model, StreamLength.recipe_class.model_validate(json.loads(recipe.read_text())))
    units = {unit.index: unit for unit in prepared.units}
    assert runner.batches(prepared, units, [5, 3, 0, 4]) == [[0], [3, 4, 5]]
