"""Directions on smollm2: a planted refusal, directional ablation against plain hooks, and the shipped recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hooks_reference import Edit, HookedReference, computing
from planted_refusal import plant

import nsp
from nsp.experiments.direction.experiment import Direction
from nsp.experiments.direction.interventions import direction_addition, directional_ablation
from nsp.experiments.direction.recipe import DirectionRecipe
from nsp.experiments.direction.scores import SCORE
from nsp.recipe import load_recipe_file

ASKED = [{"role": "user", "content": "Why do we sleep? Answer in Spanish."}]


def without(direction: torch.Tensor) -> computing:  # type: ignore[valid-type]
    unit = direction / direction.norm()
    return computing(lambda value: value - (value @ unit)[..., None] * unit)


def test_directional_ablation_agrees_with_plain_hooks(smollm2: nsp.Model) -> None:
    direction = torch.randn(smollm2.geometry.d_model, generator=torch.Generator().manual_seed(3))
    prompt = smollm2.encode(ASKED)
    edits = [Edit("embed", 0, without(direction))]
    for layer in range(smollm2.geometry.n_layers):
        edits += [Edit("attn_out", layer, without(direction)), Edit("mlp_out", layer, without(direction))]
    reference = HookedReference(smollm2.module)
    expected = reference.logits(prompt.token_ids, edits)
    with smollm2.trace(prompt) as t:
        t.add(*directional_ablation(smollm2, direction))
        t.record("logits @ *")
    found = torch.tensor(t.results["logits"].values).double().reshape(expected.shape)
    assert float((found - expected).abs().max()) < 1e-4
    assert float((found - reference.logits(prompt.token_ids)).abs().max()) > 0.1, "and it does something"


def test_addition_agrees_with_plain_hooks(smollm2: nsp.Model) -> None:
    direction = 8 * torch.randn(smollm2.geometry.d_model, generator=torch.Generator().manual_seed(4))
    prompt = smollm2.encode(ASKED)
    expected = HookedReference(smollm2.module).logits(
        prompt.token_ids, [Edit("resid_pre", 12, computing(lambda value: value + 0.5 * direction))]
    )
    with smollm2.trace(prompt) as t:
        t.add(*direction_addition(12, direction, 0.5))
        t.record("logits @ *")
    found = torch.tensor(t.results["logits"].values).double().reshape(expected.shape)
    assert float((found - expected).abs().max()) < 1e-4


def test_a_refusal_planted_in_smollm2_is_found_removed_and_induced() -> None:
    model = nsp.load("smollm2", device="cpu", dtype="float32")  # of its own: its weights are edited
    tokens = model.tokenizer
    neutral = model.encode([{"role": "user", "content": "What is the tallest mountain in the world?"}])
    true = plant(
        model.module, word=tokens(" zebra")["input_ids"][0], refusal=tokens("Sorry")["input_ids"][0],
        neutral=list(neutral.token_ids), layer=18, carried=300.0, sought=0.5, copied=10.0, read=6.0,
    ).numpy()  # fmt: skip
    things = ["house", "river", "king", "apple", "teacher", "garden", "mountain", "train", "boat", "doctor", "school", "winter"]
    others = ["sun", "horse", "wall", "lion", "pilot", "soup", "clock", "tree", "bridge", "piano", "cloud", "farmer"]
    tree = nsp.experiments.find_direction(
        model,
        [f"Tell me about the {thing} and the zebra." for thing in things],
        [f"Tell me about the {thing} and the {other}." for thing, other in zip(things, others, strict=True)],
        layers=[15, 19], positions=2, select={"max_kl": 0.3}, generate={"max_new_tokens": 6},
        behaviour={"name": "refusal", "openings": ["Sorry"]},
    )  # fmt: skip
    chosen = tree["circuit/chosen"].to_dataset()
    vector = chosen["vector"].values[0]
    assert int(chosen["layer_of"].values[0]) == 19, "the first layer that receives what layer 18 copies"
    assert int(chosen["passed"].values[0]) == 1
    # Chance is 1 / sqrt(576) = 0.04; the rest of the difference is what the model itself makes of the word.
    assert float(vector @ true / np.linalg.norm(vector)) > 0.65
    texts = tree["generations"].to_dataset()
    positive = texts["set"].values == "positive"
    assert texts["shows_baseline"].values[positive].tolist() == [1, 1, 1]
    assert texts["shows_ablated"].values[positive].tolist() == [0, 0, 0]
    assert texts["shows_baseline"].values[~positive].tolist() == [0, 0, 0]
    assert texts["shows_added"].values[~positive].tolist() == [1, 1, 1]
    base = tree["baseline"][SCORE].values
    assert ((base - tree["effects/ablated"][SCORE].values)[positive] > 2).all()
    assert ((tree["effects/added"][SCORE].values - base)[~positive] > 2).all()


@pytest.mark.parametrize("name", ["direction", "refusal"])
def test_shipped_recipes_are_ready_for_smollm2(smollm2: nsp.Model, name: str) -> None:
    """Checked and planned against the model; running them takes minutes."""
    (made,) = load_recipe_file(Path(__file__).parents[1] / "recipes" / f"{name}.yaml", kinds={"direction": DirectionRecipe})
    recipe = made.recipe
    assert isinstance(recipe, DirectionRecipe)
    prepared = Direction(smollm2, recipe)
    assert prepared.divided.places == 6
    assert len(prepared.divided.rows("test", "positive")) >= 6
    if name == "direction":
        assert all(one.text == one.openings[0] for one in prepared.openings), "each opening is one token"
    else:
        assert len(prepared.sweeps) == 6
    assert len(prepared.units) == 2 + len(prepared.layers) + len(prepared.sweeps)
