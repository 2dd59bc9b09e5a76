"""Means over prompts: equal to hooks, kept in a store, and ablated with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, HEADS, LAYERS, both, one_thread, text

import nsp
from nsp.errors import InputError
from nsp.experiments import contrast, mean_activations
from nsp.experiments.mean_activations.summary import summarise

__all__ = ["one_thread"]
IDS = [CLEAN, [1, 2, 3], [4, 5, 6, 7], CORRUPT[:6]]
PROMPTS = [text(ids) for ids in IDS]
COMPONENTS = ["mlp_neurons", "z", "resid_post", "attn_out", "q", "mlp_up"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("drop_first", [0, 1])
def test_means_are_those_of_hooks(family: str, drop_first: int) -> None:
    pair = both(family)
    tree = mean_activations(pair.model, PROMPTS, components=COMPONENTS, drop_first=drop_first)
    for name in COMPONENTS:
        mean, std = tree[f"activations/{name}"]["mean"], tree[f"activations/{name}"]["std"]
        assert mean.dims == (("layer", "head", "neuron") if name in ("z", "q") else ("layer", "neuron"))
        for layer in range(LAYERS):
            values = [pair.reference.values(ids, [(name, layer)])[(name, layer)][drop_first:] for ids in IDS]
            tokens = torch.cat(values)
            shape = mean.values[layer].shape
            assert np.allclose(mean.values[layer], tokens.mean(dim=0).reshape(shape).numpy(), atol=1e-4)
            assert np.allclose(std.values[layer], tokens.std(dim=0, correction=0).reshape(shape).numpy(), atol=1e-4)


def logit(of: nsp.Model, site: str, **options: Any) -> float:
    with of.trace(CORRUPT) as t:
        t.ablate(site, "mean", **options)
        t.measure(nsp.logit(3))
    return float(t.results["logit"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["mlp_neurons[1]", "z[1][2] @ 3", "resid_post[0] @ last", "q[2]", "mlp_up[*][5,7]", "attn_out[1:3] @ 2:"])
def test_a_kept_mean_ablates_as_its_prompts_do(family: str, site: str, tmp_path: Path) -> None:
    of = both(family).model
    tree = mean_activations(of, PROMPTS, components=COMPONENTS, out=tmp_path / "means.zarr")
    expected = logit(of, site, reference=PROMPTS)
    assert logit(of, site, reference=tmp_path / "means.zarr") == pytest.approx(expected, abs=1e-4)
    name = nsp.Site.parse(site).component
    assert logit(of, site, reference=tree[f"activations/{name}"]["mean"]) == pytest.approx(expected, abs=1e-4)
    with of.trace(CORRUPT) as t:
        t.measure(nsp.logit(3))
    assert abs(float(t.results["logit"]) - expected) > 1e-3


def test_means_of_each_position() -> None:
    of = both("llama").model
    tree = mean_activations(of, [text(CLEAN), text(CORRUPT)], components="z", over="prompts")
    mean = tree["activations/z"]["mean"]
    assert mean.dims == ("layer", "position", "head", "neuron")
    assert mean.sizes["head"] == HEADS
    expected = logit(of, "z[1]", reference=[CLEAN, CORRUPT], over="prompts")
    assert logit(of, "z[1]", reference=mean) == pytest.approx(expected, abs=1e-4)


def test_a_sweep_can_ablate_to_kept_means(tmp_path: Path) -> None:
    of = both("llama").model
    mean_activations(of, PROMPTS, components="mlp_neurons", out=tmp_path / "m.zarr")
    found = []
    for reference in (PROMPTS, str(tmp_path / "m.zarr")):
        with of.trace(CORRUPT) as t:
            t.sweep(nsp.ablate("mlp_neurons[*][3,9] @ *", "mean", reference=reference))
            t.measure(nsp.logit(3))
        found.append(t.results["logit"].values)
    assert np.allclose(*found, atol=1e-4)


def test_a_plan_with_kept_means_runs_again() -> None:
    of = both("llama").model
    mean = mean_activations(of, PROMPTS, components="z")["activations/z"]["mean"]
    with of.trace(CORRUPT) as t:
        t.ablate("z[1][0]", "mean", reference=mean)
        t.measure(nsp.logit(3))
    again = of.rerun(t.plan)
    assert again.plan.hash == t.plan.hash
    assert float(again.results["logit"]) == float(t.results["logit"])
    mean[:] = 0  # a statement keeps its own values
    assert of.rerun(t.plan).plan.hash == t.plan.hash


def test_what_cannot_be_ablated_so_says_why(tmp_path: Path) -> None:
    of = both("llama").model
    mean_activations(of, PROMPTS, components="z", out=tmp_path / "m.zarr")
    with pytest.raises(InputError, match="it has z"):
        nsp.ablate("mlp_out[1]", "mean", reference=tmp_path / "m.zarr")
    with pytest.raises(InputError, match="'resample' takes prompts"):
        nsp.ablate("z[1]", "resample", reference=tmp_path / "m.zarr")
    contrast(of, PROMPTS[:2], PROMPTS[2:], resamples=2, out=tmp_path / "c.zarr")
    with pytest.raises(InputError, match="kind 'contrast'"):
        nsp.ablate("resid_post[1]", "mean", reference=tmp_path / "c.zarr")
    part = mean_activations(of, PROMPTS, components="z")["activations/z"]["mean"].isel(layer=[0])
    with pytest.raises(InputError, match="no layer 1"):
        logit(of, "z[1]", reference=part)
    with pytest.raises(InputError, match="one length"):
        mean_activations(of, PROMPTS, over="prompts")
    with pytest.raises(InputError, match="left with none"):
        mean_activations(of, PROMPTS, drop_first=3)
    with pytest.raises(Exception, match="pattern cannot"):
        mean_activations(of, PROMPTS, components="pattern")


def test_the_store_is_plain_and_says_what_it_holds(tmp_path: Path) -> None:
    of = both("llama").model
    here = mean_activations(of, None, components=["z", "mlp_out"])  # neutral sentences: <unk> to this tokenizer, but tokens
    mean_activations(of, PROMPTS, components=["z", "mlp_out"], out=tmp_path / "m.zarr")
    anyone = xr.open_datatree(tmp_path / "m.zarr", engine="zarr", consolidated=False)
    assert anyone["activations/mlp_out"]["mean"].dims == ("layer", "neuron")
    assert here["activations/mlp_out"]["mean"].shape == anyone["activations/mlp_out"]["mean"].shape
    said = str(summarise(nsp.open_run(tmp_path / "m.zarr").tree))
    assert "4 prompts, 22 tokens" in said
    assert "3 layer x 4 head x 8 neuron" in said
