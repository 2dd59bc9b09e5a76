"""Activation patching on smollm2: the known figures of the Mary/John pair by every door, and properties that must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import one_thread  # noqa: F401
from hooks_reference import Edit, HookedReference, replacing

import nsp
from nsp.experiments import EXPERIMENTS, run
from nsp.recipe import find_recipe, load_recipe_file

KIND = "activation-patching"
# Issue 2, acceptance 2: plain transformers and TransformerLens give these on the same file.
CLEAN_DIFFERENCE, CORRUPT_DIFFERENCE = 6.1196, -5.4853
FIGURES = {(10, 9): 6.1124, (0, 9): 6.1267, (20, 13): -1.6562, (29, 13): 6.1196}
CLOSE = {"rtol": 0, "atol": 0.002}


# The figures


def assert_figures(found: xr.DataArray) -> None:
    """A sweep of resid_post in logit differences, dims (layer, position), against the known figures."""
    assert found.sizes["layer"] == 30
    assert found.sizes["position"] == 14
    for (layer, position), value in FIGURES.items():
        np.testing.assert_allclose(found.sel(layer=layer, position=position), value, **CLOSE)
    shared = found.sel(position=slice(0, 8))
    np.testing.assert_allclose(shared, CORRUPT_DIFFERENCE, **CLOSE)
    np.testing.assert_allclose(shared, shared[0, 0], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def hooks(smollm2: nsp.Model) -> HookedReference:
    """Plain transformers with hooks, on the same float32 weights."""
    return HookedReference(smollm2.module)


@pytest.fixture(scope="module")
def ids(tokenizer: Any, ioi_pair: nsp.Pair) -> dict[str, Any]:
    tokens = {name: tokenizer(getattr(ioi_pair, name))["input_ids"] for name in ("clean", "corrupt")}
    return {**tokens, "answer": tokenizer(" Mary")["input_ids"][0], "distractor": tokenizer(" John")["input_ids"][0]}


def test_the_figures_by_plain_transformers(hooks: HookedReference, ids: dict[str, Any]) -> None:
    def difference(prompt: list[int], *edits: Edit) -> float:
        logits = hooks.logits(prompt, edits)[-1]
        return float(logits[ids["answer"]] - logits[ids["distractor"]])

    np.testing.assert_allclose(difference(ids["clean"]), CLEAN_DIFFERENCE, **CLOSE)
    np.testing.assert_allclose(difference(ids["corrupt"]), CORRUPT_DIFFERENCE, **CLOSE)
    donors = hooks.values(ids["clean"], [("resid_post", layer) for layer, _ in FIGURES])
    for (layer, position), value in FIGURES.items():
        edit = Edit("resid_post", layer, replacing(donors["resid_post", layer], [position], None))
        np.testing.assert_allclose(difference(ids["corrupt"], edit), value, **CLOSE)


def test_the_figures_by_a_trace_sweep(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    with smollm2.trace(ioi_pair.corrupt) as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor=ioi_pair.clean))
        t.measure(nsp.logit_diff(" Mary", " John"))
    assert_figures(t.results["logit_diff"])
    assert t.receipts[0].path == "branch"
    np.testing.assert_allclose(t.results["logit_diff_donor"], CLEAN_DIFFERENCE, **CLOSE)
    np.testing.assert_allclose(t.results["logit_diff_base"], CORRUPT_DIFFERENCE, **CLOSE)
    effect = t.results["effect"]
    np.testing.assert_allclose(effect.sel(layer=29, position=13), 1, atol=1e-5)
    assert (effect.sel(position=slice(0, 8)) == 0).all()
    # All that is known to be zero is pruned: nine shared tokens, and the last layer's tokens that nothing reads.
    assert (t.receipts[0].branches, t.receipts[0].unchanged) == (29 * 5 + 1, 420 - 29 * 5 - 1)


def test_the_figures_by_single_counterfactuals(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    for (layer, position), value in FIGURES.items():
        with smollm2.trace(ioi_pair.corrupt) as t:
            t.patch(f"resid_post[{layer}] @ {position}", donor=ioi_pair.clean)
            t.measure(nsp.logit_diff(" Mary", " John"))
        np.testing.assert_allclose(t.results["logit_diff"], value, **CLOSE)


def test_the_figures_by_the_shipped_recipe(smollm2: nsp.Model, tmp_path: Path) -> None:
    kinds = {KIND: EXPERIMENTS[KIND].recipe_class}
    (item,) = load_recipe_file(find_recipe("ioi"), [f"out={tmp_path / 'ioi.zarr'}"], kinds=kinds)
    run(EXPERIMENTS[KIND](smollm2, item.recipe), out=item.out, progress=False)
    tree = xr.open_datatree(item.out, engine="zarr", consolidated=False)
    assert_figures(tree["effects/resid_post"]["logit_diff"].squeeze("pair"))
    np.testing.assert_allclose(tree["baseline"]["logit_diff_clean"], CLEAN_DIFFERENCE, **CLOSE)
    np.testing.assert_allclose(tree["baseline"]["logit_diff_corrupt"], CORRUPT_DIFFERENCE, **CLOSE)
    cell = tree["effects/resid_post"]["logit_diff"].sel(layer=10, position=9)  # as in DESIGN.md
    np.testing.assert_allclose(cell, [6.1124], **CLOSE)
    words = tree["effects/resid_post"]["token_text"].values.reshape(-1).tolist()
    assert words[:4] == ["When", " Mary", " and", " John"]
    summary = EXPERIMENTS[KIND].summary(tree)
    assert "clean 6.1196, corrupt -5.4853" in "\n".join(summary.lines)
    assert {row[1:3] for row in summary.tables[0].rows} >= {(9, "' Mary'")}


@pytest.mark.parametrize("component", ["k", "z", "mlp_neurons", "resid_mid", "pattern"])
def test_a_sample_of_each_component_against_hooks(
    smollm2: nsp.Model, hooks: HookedReference, ids: dict[str, Any], component: str
) -> None:
    unit = {"k": 2, "z": 5, "mlp_neurons": 1000, "pattern": 3}.get(component)
    cells = [(3, 9), (17, 11), (29, 13)]
    donors = hooks.values(ids["clean"], [(component, layer) for layer, _ in cells])
    site = f"{component}[3,17,29]{'' if unit is None else f'[{unit}]'} @ 9,11,13"
    with smollm2.trace(ids["corrupt"], path="branch") as t:
        t.sweep(nsp.patch(site, donor=ids["clean"]))
        t.measure(nsp.logit(ids["answer"]))
    for layer, position in cells:
        units = None if unit is None else [unit]
        edit = Edit(component, layer, replacing(donors[component, layer], [position], units))
        exact = float(hooks.logits(ids["corrupt"], [edit])[-1, ids["answer"]])
        found = float(t.results["logit"].sel(layer=layer, position=position).squeeze())
        assert found == pytest.approx(exact, abs=1e-4), (layer, position)


# Properties on the real model (issue 2, acceptance 3)


COMPONENTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")
COMPONENTS += ("mlp_gate", "mlp_up", "mlp_neurons")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_self_patch_and_a_scale_by_one_change_no_bit(smollm2: nsp.Model, ioi_pair: nsp.Pair, component: str) -> None:
    with smollm2.trace(ioi_pair.corrupt) as t:
        t.patch(f"{component}[7,18]", donor=ioi_pair.corrupt)
        t.scale(f"{component}[12]", 1.0)
        t.measure(nsp.logit_diff(" Mary", " John"), nsp.l2("base"))
    assert all(receipt.fired > 0 and receipt.change_max == 0 for receipt in t.receipts)
    assert float(t.results["logit_diff"]) == float(t.results["logit_diff_base"])
    assert float(t.results["l2"]) == 0


def test_a_self_patch_on_the_branch_path(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    """The recording stands for another prompt, so that nothing is known to be equal and every branch runs."""
    with smollm2.trace(ioi_pair.corrupt) as t:
        t.record("resid_post[5,25]", "z[5,25]")
    for name in ("resid_post", "z"):
        donor = t.results[f"activations/{name}/{name}"]
        with smollm2.trace(ioi_pair.corrupt, path="branch") as again:
            again.sweep(nsp.patch(f"{name}[5,25] @ *", donor=donor))
            again.measure(nsp.logit_diff(" Mary", " John"))
        assert again.receipts[0].branches == 28
        base = float(again.results["logit_diff_base"])
        np.testing.assert_allclose(again.results["logit_diff"], base, rtol=0, atol=5e-5)


def test_every_position_together_is_the_donors_run(
    smollm2: nsp.Model, ioi_pair: nsp.Pair, hooks: HookedReference, ids: Any
) -> None:
    with smollm2.trace(ioi_pair.corrupt) as t:
        t.patch("resid_post[14]", donor=ioi_pair.clean)
        t.record("logits")
    np.testing.assert_allclose(t.results["logits"], hooks.logits(ids["clean"]), atol=2e-3)


def test_all_heads_together_are_z(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    found = []
    for units in ("", "[*]"):
        with smollm2.trace(ioi_pair.corrupt) as t:
            t.patch(f"z[20:24]{units} @ 9:14", donor=ioi_pair.clean)
            t.measure(nsp.logit_diff(" Mary", " John"))
        found.append(float(t.results["logit_diff"]))
    assert found[0] == found[1]
    assert found[0] != pytest.approx(CORRUPT_DIFFERENCE, abs=0.01)


def test_one_is_many_is_padded(smollm2: nsp.Model, ioi_pair: nsp.Pair, tokenizer: Any) -> None:
    prompts = [
        ioi_pair.corrupt,
        "The",
        "In the town of York there is a very old and a rather tall church",
        ioi_pair.clean,
    ]

    def run_on(prompt: Any) -> xr.DataArray:
        with smollm2.trace(prompt) as t:
            t.scale("attn_out[11] @ last", 0.0)
            t.measure(nsp.logit_diff(" Mary", " John"))
        return t.results["logit_diff"]

    many = run_on(prompts)
    for number, prompt in enumerate(prompts):
        np.testing.assert_allclose(many[number], run_on(prompt), rtol=0, atol=1e-4)
    # transformers' own padded batch, on the left.
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = smollm2.module(**batch, position_ids=places).logits[:, -1]
    mary, john = (tokenizer(word)["input_ids"][0] for word in (" Mary", " John"))
    with smollm2.trace(prompts) as t:
        t.measure(nsp.logit_diff(" Mary", " John"))
    np.testing.assert_allclose(t.results["logit_diff"], logits[:, mary] - logits[:, john], rtol=0, atol=1e-4)
