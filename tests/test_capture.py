"""Capture: what lies in the store is what the model computed, and its summaries say the truth about it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import nsp
from nsp.experiments import capture, top_examples, unit_statistics
from nsp.experiments.capture.recipe import CaptureRecipe
from nsp.experiments.registry import EXPERIMENTS
from nsp.experiments.runner import run
from nsp.stores import open_run, validate

PROMPTS = ["The capital of France is Paris", "Hi", "When Mary and John went to the store, John gave a drink to", "One two"]


@pytest.fixture(scope="module")
def hooked(smollm2: Any) -> dict[str, list[torch.Tensor]]:
    """Inputs of every down and output projection, and each layer's output, one tensor (layer, position, width) a prompt."""
    found: dict[str, list[torch.Tensor]] = {"mlp_neurons": [], "z": [], "resid_post": []}
    for text in PROMPTS:
        kept: dict[str, list[torch.Tensor]] = {name: [] for name in found}
        hooks = []
        for layer in smollm2.module.model.layers:
            hooks += [
                layer.mlp.down_proj.register_forward_pre_hook(lambda _m, a, k=kept: k["mlp_neurons"].append(a[0][0])),
                layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, a, k=kept: k["z"].append(a[0][0])),
                layer.register_forward_hook(lambda _m, _a, out, k=kept: k["resid_post"].append(out[0])),
            ]
        with torch.no_grad():
            smollm2.module(torch.tensor([smollm2.encode(text).token_ids]))
        for hook in hooks:
            hook.remove()
        for name, values in kept.items():
            found[name].append(torch.stack(values))
    return found


@pytest.fixture(scope="module")
def captured(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    out = tmp_path_factory.mktemp("capture") / "run.zarr"
    return capture(smollm2, PROMPTS, components=["mlp_neurons", "z", "resid_post"], out=out)


@pytest.mark.parametrize("name", ["mlp_neurons", "z", "resid_post"])
def test_every_value_is_the_models_and_beyond_a_prompt_there_is_none(
    captured: xr.DataTree, hooked: dict[str, list[torch.Tensor]], name: str
) -> None:
    value = captured[f"activations/{name}"]["value"]
    assert value.dims == (("prompt", "layer", "position", "head", "neuron") if name == "z" else ("prompt", "layer", "position", "neuron"))
    for row, expected in enumerate(hooked[name]):
        length = expected.shape[1]
        here = value.isel(prompt=row).values
        found = here[:, :length].reshape(expected.shape)
        np.testing.assert_allclose(found, expected.numpy(), atol=2e-5 * float(expected.abs().max()))
        assert np.isnan(here[:, length:]).all()


def test_summaries_are_those_of_the_values(captured: xr.DataTree) -> None:
    group = captured["activations/mlp_neurons"]
    value = group["value"].values
    np.testing.assert_array_equal(group["max"].values, np.nanmax(value, axis=2))
    np.testing.assert_array_equal(group["max_position"].values, np.nanargmax(value, axis=2))
    np.testing.assert_allclose(group["mean"].values, np.nanmean(value, axis=2, dtype=np.float64), rtol=1e-3, atol=1e-4)
    flat = np.concatenate([value[row][:, : int(n)] for row, n in enumerate(captured["inputs"]["n_tokens"])], axis=1)
    found = unit_statistics(captured, "mlp_neurons")
    np.testing.assert_allclose(found["mean"].values, flat.mean(axis=1, dtype=np.float64), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["std"].values, flat.std(axis=1, dtype=np.float64), rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(found["max"].values, flat.max(axis=1))


def test_top_examples_name_the_token_of_the_peak(captured: xr.DataTree) -> None:
    value = captured["activations/mlp_neurons"]["value"].sel(layer=12, neuron=700).values
    best = int(np.nanargmax(np.nanmax(value, axis=1)))
    found = top_examples(captured, "mlp_neurons", 12, 700, k=2)
    assert found["prompt"].values.tolist()[0] == best
    place = int(np.nanargmax(value[best]))
    assert found["token"].values[0] == captured["inputs"]["token_text"].values[best, place]
    assert f"«{found['token'].values[0]}»" in found["context"].values[0]
    with pytest.raises(nsp.InputError, match="has heads"):
        top_examples(captured, "z", 3, 5)
    with pytest.raises(nsp.InputError, match="not attn_out"):
        top_examples(captured, "attn_out", 3, 5)


def test_summary_alone_leaves_the_values_out(smollm2: Any, captured: xr.DataTree) -> None:
    tree = capture(smollm2, PROMPTS, layers=[3, 12], keep="summary")
    group = tree["activations/mlp_neurons"]
    assert "value" not in group
    expected = captured["activations/mlp_neurons"]["max"].sel(layer=[3, 12]).values
    np.testing.assert_allclose(group["max"].values, expected, rtol=1e-4, atol=1e-4)


def test_it_streams_resumes_and_follows_the_schema(
    smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("nsp.experiments.capture.experiment")
    monkeypatch.setattr(module, "_UNIT_BYTES", 500_000)
    recipe = CaptureRecipe.model_validate({"kind": "capture", "prompts": PROMPTS, "layers": "0:4", "max_tokens": 6})
    job = EXPERIMENTS["capture"](smollm2, recipe)
    assert len(job.units) > 1
    done = []

    class Stops:
        """The job, interrupted before its last unit."""

        def __getattr__(self, name: str) -> Any:
            return getattr(job, name)

        def compute(self, unit: Any, stored: Any, progress: Any = None) -> Any:
            if unit.index == len(job.units) - 1 and not done:
                done.append(unit.index)
                raise KeyboardInterrupt
            return job.compute(unit, stored, progress)

    path = tmp_path / "run.zarr"
    with pytest.raises(KeyboardInterrupt):
        run(Stops(), out=path, progress=False)  # type: ignore[arg-type]
    assert open_run(path).state == "running"
    tree = run(job, out=path, progress=False).tree
    assert validate(path, deep=True).problems == ()
    assert tree["inputs"]["n_tokens"].values.max() == 6
    assert np.isfinite(tree["activations/mlp_neurons"]["max"].values).all()
