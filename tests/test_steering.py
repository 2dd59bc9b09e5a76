"""Steering: next-token probabilities and texts against raw hooks, the strength that changes nothing, fluency numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import CLEAN, CORRUPT, LAYERS, NEURONS, WIDTH, both, model, one_thread, text
from hooks_reference import Edit, computing

import nsp
from nsp.engine.budget import Budget
from nsp.engine.generation import Decoding
from nsp.engine.scoring import continuation_logprobs
from nsp.engine.steering_multipliers import next_logits, strength_branches
from nsp.errors import InputError
from nsp.experiments import EXPERIMENTS, contrast, steering
from nsp.experiments.circuits import Circuit, CircuitUnit
from nsp.experiments.contrast.vectors import ControlVectors
from nsp.experiments.fluency import distinct, perplexities, repetition
from nsp.experiments.steering.summary import summarise
from nsp.experiments.steering.target import SteeringTarget
from nsp.interventions import Intervention
from nsp.recipe import load_recipe_file

__all__ = ["one_thread"]
MULTIPLIERS = (-1.5, 0.0, 0.5, 1.0, 3.0)
PROMPTS = [CLEAN, CORRUPT[:5], CORRUPT]
STEPS = 6
CIRCUIT = Circuit(
    (CircuitUnit(0, 1, 3, 1.0), CircuitUnit(0, -1, 7, 0.5), CircuitUnit(2, -1, 5, -2.0), CircuitUnit(1, None, 11, 0.1))
)


def vectors(layers: tuple[int, ...] = (1,), component: str = "resid_post", size: float = 1.5) -> ControlVectors:
    width = NEURONS if component == "mlp_neurons" else WIDTH
    values = np.random.default_rng(3).normal(size=(len(layers), width)).astype(np.float32) * size
    return ControlVectors(component, layers, values)


def edits_of(target: SteeringTarget, multiplier: float, positions: str, length: int) -> list[Edit]:
    """The same change, for raw hooks."""
    places = None if positions == "all" else [length - 1]
    if target.vectors is not None:
        return [
            Edit(target.vectors.component, layer, computing(_adding(torch.tensor(vector) * multiplier), places))
            for layer, vector in zip(target.vectors.layers, target.vectors.values, strict=True)
        ]
    assert target.circuit is not None
    found = []
    for unit in target.circuit:
        at = places
        if positions == "own":
            at = None if unit.position is None else [unit.position % length]
        found.append(Edit("mlp_neurons", unit.layer, computing(lambda value: value * multiplier, at, [unit.unit])))
    return found


def _adding(vector: torch.Tensor) -> Any:
    return lambda value: value + vector.reshape(value.shape[1:])


TARGETS = {
    "vector": SteeringTarget(vectors=vectors()),
    "vectors": SteeringTarget(vectors=vectors((0, 2), "mlp_out")),
    "neurons": SteeringTarget(vectors=vectors((1,), "mlp_neurons", 0.7)),
    "circuit": SteeringTarget(circuit=CIRCUIT),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("name", "positions"),
    [("vector", "all"), ("vector", "last"), ("vectors", "all"), ("neurons", "all"), ("circuit", "all"), ("circuit", "own"), ("circuit", "last")],
)
def test_next_token_probabilities_are_those_of_hooks(family: str, name: str, positions: str) -> None:
    pair, target = both(family), TARGETS[name]
    tree = steering(
        pair.model, [text(prompt) for prompt in PROMPTS], feature=target, multipliers=MULTIPLIERS, positions=positions,
        tokens=["w3", "w17"], top_k=4, decoding=None,
    )  # fmt: skip
    found, top = tree["effects/tokens"]["prob"], tree["effects/next_token"].to_dataset()
    assert found["multiplier"].values.tolist() == sorted(MULTIPLIERS)
    for row, prompt in enumerate(PROMPTS):
        plain = pair.reference.logits(prompt)[-1].log_softmax(0)
        for direction, multiplier in enumerate(found["multiplier"].values.tolist()):
            logits = pair.reference.logits(prompt, edits_of(target, multiplier, positions, len(prompt)))[-1]
            expected = logits.log_softmax(0)
            assert np.allclose(found.values[row, direction], expected.exp()[[3, 17]].numpy(), atol=1e-4)
            assert top["kl"].values[row, direction] == pytest.approx(
                float((plain.exp() * (plain - expected)).sum()), abs=1e-4, rel=1e-3
            )
            assert np.allclose(top["top_prob"].values[row, direction], expected.exp().topk(4).values.numpy(), atol=1e-4)
            assert top["top_id"].values[row, direction, 0] == int(expected.argmax())
    neutral = found["multiplier"].values.tolist().index(target.neutral)
    assert (top["kl"].values[:, neutral] == 0).all()


def hooked(of: nsp.Model, prompt: list[int], vector: torch.Tensor, layer: int, when: str) -> list[int]:
    """transformers' greedy text under a forward hook that adds a vector."""

    def hook(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        generated = output.shape[1] == 1
        acts = when == "both" or (when == "generated") == generated
        return output + vector if acts else output

    handle = of.module.model.layers[layer].register_forward_hook(hook)
    try:
        given = torch.tensor([prompt])
        made = of.module.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0
        )
    finally:
        handle.remove()
    return list(made[0, len(prompt) :].tolist())


@pytest.mark.parametrize("when", ["prompt", "generated", "both"])
def test_texts_of_all_multipliers_are_those_of_hooks(when: str) -> None:
    llama, given = both("llama").model, vectors()
    tree = steering(
        llama, [text(prompt) for prompt in PROMPTS], vector=given, multipliers=MULTIPLIERS, when=when,
        decoding={"max_new_tokens": STEPS, "stop": False},
    )  # fmt: skip
    made = tree["generations"].to_dataset()
    seen = set()
    for row, prompt in enumerate(PROMPTS):
        for direction, multiplier in enumerate(made["multiplier"].values.tolist()):
            expected = hooked(llama, prompt, torch.tensor(given.values[0]) * multiplier, 1, when)
            assert made["token_id"].values[row, direction].tolist() == expected
            seen.add(tuple(expected))
    assert len(seen) > len(PROMPTS) + 2  # the vector does change texts


def plain_texts(of: nsp.Model, prompts: list[list[int]], **decoding: Any) -> list[list[int]]:
    with of.trace(prompts) as t:
        t.generate(STEPS, stop=False, **decoding)
    found: list[list[int]] = t.results["token_id"].values.tolist()
    return found


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_neutral_multiplier_reproduces_the_unsteered_text(name: str, temperature: float) -> None:
    llama, target = both("llama").model, TARGETS[name]
    decoding = {"max_new_tokens": STEPS, "stop": False, "temperature": temperature, "seed": 4}
    tree = steering(llama, [text(prompt) for prompt in PROMPTS], feature=target, multipliers=[2.0, 4.0], decoding=decoding)
    made, fired = tree["generations"].to_dataset(), tree["receipts/steering"]["fired"].values
    assert made["multiplier"].values.tolist() == [target.neutral, 2.0, 4.0]  # it is always there
    assert made["token_id"].values[:, 0].tolist() == plain_texts(llama, PROMPTS, temperature=temperature, seed=4)
    assert (fired[:, 0] == 0).all()
    assert (fired[:, 1:] > 0).all()


def test_sampled_texts_differ_by_the_steering_alone() -> None:
    """Every multiplier of a prompt draws the same numbers, so a strength too small to matter changes nothing."""
    llama = both("llama").model
    decoding = {"max_new_tokens": STEPS, "stop": False, "temperature": 1.0}
    tree = steering(llama, text(CLEAN), vector=vectors(size=1e-6), multipliers=[-1.0, 1.0, 2.0], decoding=decoding)
    ids = tree["generations"]["token_id"].values[0]
    assert (ids == ids[0]).all()
    others = [steering(llama, text(CLEAN), vector=vectors(), decoding={**decoding, "seed": seed}) for seed in (1, 2, 3)]
    assert any((one["generations"]["token_id"].values[0, 2] != ids[0]).any() for one in others)


def test_a_small_budget_gives_the_same_numbers(tmp_path: Path) -> None:
    llama = both("llama").model
    prompts = [llama.encode(prompt) for prompt in PROMPTS]
    branches = strength_branches(llama.runtime, prompts, vectors().interventions(), MULTIPLIERS)
    large, small = Budget.of(None, llama.runtime.device), Budget.of("40KB", llama.runtime.device)
    texts = [
        llama.engine.within(budget.bytes).generate(branches, Decoding(STEPS, stop=False), when="both").by_branch
        for budget in (large, small)
    ]
    assert (texts[0] == texts[1]).all()
    chunks = [list(next_logits(llama.runtime, branches, budget)) for budget in (large, small)]
    assert len(chunks[1]) > len(chunks[0])
    whole, parts = (torch.cat([logits for _, logits in made]) for made in chunks)
    assert torch.allclose(whole, parts, atol=1e-4)


def test_a_run_in_a_store_is_the_run_in_memory(tmp_path: Path) -> None:
    llama = both("llama").model
    prompts = [text([*CLEAN[:3], number]) for number in range(10)]  # more than one unit of work
    options: dict[str, Any] = {"circuit": CIRCUIT, "tokens": ["w3"], "decoding": {"max_new_tokens": 4}}
    here = steering(llama, prompts, **options)
    kept = steering(llama, prompts, out=tmp_path / "x.zarr", **options)
    for path in ("generations", "effects/next_token", "effects/tokens", "receipts/steering"):
        for name, value in here[path].to_dataset().data_vars.items():
            stored = kept[path][name].values
            same = np.array_equal(stored, value.values, equal_nan=True) if value.dtype.kind == "f" else (stored == value.values).all()
            assert same, (path, name)
    run = nsp.open_run(tmp_path / "x.zarr")
    assert Circuit.from_dataset(run.tree["circuit/mlp_neurons"].to_dataset()).units == CIRCUIT.units
    said = str(summarise(run.tree))
    assert "scaling 4 unit(s) of mlp_neurons" in said
    assert "P(' w3')" in said or "P('w3')" in said


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_only_what_scales_or_adds_has_a_strength() -> None:
    llama = both("llama").model
    prompts = [llama.encode(CLEAN)]
    wrong: list[Intervention] = [
        nsp.patch("resid_post[1]", donor=CORRUPT), nsp.ablate("z[1]"), nsp.inject("resid_post[1]", torch.zeros(WIDTH), mode="set"),
    ]  # fmt: skip
    for item in wrong:
        with pytest.raises(InputError, match="only what scales or adds"):
            strength_branches(llama.runtime, prompts, [item], [1.0])
    with pytest.raises(InputError, match="pattern cannot be steered"):
        strength_branches(llama.runtime, prompts, [nsp.scale("pattern[1]", 1.0)], [2.0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "one of vector, circuit, neurons, feature"),
        ({"vector": vectors(), "circuit": CIRCUIT}, "one of vector, circuit, neurons, feature"),
        ({"vector": vectors(), "positions": "own"}, "positions of its own"),
        ({"circuit": CIRCUIT, "positions": "own", "when": "both"}, "when: prompt"),
        ({"vector": vectors((LAYERS,))}, "layer"),
        ({"vector": vectors(), "tokens": ["no such token"]}, "tokens"),
        ({"vector": vectors(), "multipliers": [1, 1.0]}, "twice"),
        ({"neurons": ["L1/x"]}, "L23/N8079"),
        ({"neurons": [f"L1/N{NEURONS}"]}, "neuron"),
        ({"vector": {"positive": ["w1"]}}, "both positive and negative"),
        ({"vector": {"store": "no-such.zarr"}}, "does not exist"),
        ({"circuit": CIRCUIT, "prompts": []}, "prompt"),
        ({"circuit": CIRCUIT, "top_k": 999}, "has 61 tokens"),
        ({"circuit": CIRCUIT, "tokens": [61]}, "has 61 tokens"),
        ({"circuit": CIRCUIT, "decoding": {"max_new_tokens": 60}}, "reads at most 64"),
    ],
)
def test_wrong_options_name_what_would_work(options: dict[str, Any], said: str) -> None:
    prompts = options.pop("prompts", [text(CLEAN)]) if "prompts" in options else [text(CLEAN)]
    with pytest.raises(Exception, match=said):
        steering(both("llama").model, prompts, **options)


def test_an_empty_circuit_is_refused() -> None:
    with pytest.raises(InputError, match="no unit"):
        SteeringTarget(circuit=Circuit(()))


# --- where vectors come from ----------------------------------------------------------------------------------------


def test_vectors_from_prompts_from_a_store_and_given_are_the_same(tmp_path: Path) -> None:
    llama = both("llama").model
    positive, negative = [text(CLEAN), text([1, 2, 3])], [text(CORRUPT), text([1, 2, 5])]
    contrast(llama, positive, negative, components="resid_post", resamples=5, out=tmp_path / "c.zarr")
    common: dict[str, Any] = {"tokens": ["w3"], "decoding": None}
    from_prompts = steering(llama, text(CLEAN), vector={"positive": positive, "negative": negative, "layers": 1}, **common)
    from_store = steering(llama, text(CLEAN), vector={"store": str(tmp_path / "c.zarr"), "layers": "1"}, **common)
    probabilities = [tree["effects/tokens"]["prob"].values for tree in (from_prompts, from_store)]
    assert np.array_equal(*probabilities)
    assert from_store["activations/resid_post"]["layer"].values.tolist() == [1]


def test_the_shipped_recipe_is_checked_like_any_other() -> None:
    (run,) = load_recipe_file("steering", kinds={kind: one.recipe_class for kind, one in EXPERIMENTS.items()})
    assert run.recipe.kind == "steering"


# --- fluency --------------------------------------------------------------------------------------------------------


def test_repetition_counts_repeated_n_grams() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 6) == 1
    assert repetition([1, 2, 3, 9, 1, 2, 3]) == pytest.approx(2 / 5)
    assert np.isnan(repetition([1, 2]))
    assert distinct([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4)
    assert distinct([1, 2, 3], 1) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_is_that_of_a_forward_pass(family: str) -> None:
    of = both(family).model
    texts = [[4, 9, 2], [], [8], CORRUPT]
    found = perplexities(of.runtime, [CLEAN, CLEAN, CORRUPT[:2], CLEAN[:4]], texts)
    for prompt, rest, value in zip([CLEAN, CLEAN, CORRUPT[:2], CLEAN[:4]], texts, found, strict=True):
        if not rest:
            assert np.isnan(value)
            continue
        log_p = of.module(torch.tensor([[*prompt, *rest]])).logits[0].double().log_softmax(-1)
        scores = log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(rest)[:, None])
        assert value == pytest.approx(float(torch.exp(-scores.mean())), rel=1e-4)
    small = continuation_logprobs(of.runtime, [CLEAN, CORRUPT[:2]], [[4, 9, 2], [8]], max_tokens=4)
    large = continuation_logprobs(of.runtime, [CLEAN, CORRUPT[:2]], [[4, 9, 2], [8]])
    for one, other in zip(small, large, strict=True):
        assert np.allclose(one, other, atol=1e-5)


# --- a real model ---------------------------------------------------------------------------------------------------


def test_smollm2_under_a_cheerful_vector(smollm2: nsp.Model) -> None:
    """On a real model: probabilities equal raw hooks to 1e-4, and turn towards the vector's meaning."""
    sets = {
        "positive": ["I feel great and", "What a lovely day, it was", "She smiled because it was", "They were happy and"],
        "negative": ["I feel awful and", "What a terrible day, it was", "She wept because it was", "They were miserable and"],
    }
    prompt, layer = "I think that this film is very", 12
    tree = steering(
        smollm2, prompt, vector={**sets, "layers": layer}, multipliers=[-2.0, 2.0], tokens=[" good", " bad"],
        decoding={"max_new_tokens": 3},
    )  # fmt: skip
    prob, vector = tree["effects/tokens"]["prob"].values[0], tree["activations/resid_post"]["vector"].values[0]
    ids = list(smollm2.encode(prompt).token_ids)
    good, bad = tree["effects/tokens"]["token"].values.tolist()
    for direction, multiplier in enumerate((-2.0, 0.0, 2.0)):
        handle = smollm2.module.model.layers[layer].register_forward_hook(
            lambda _m, _a, output, multiplier=multiplier: output + multiplier * torch.tensor(vector)
        )
        with torch.no_grad():
            expected = smollm2.module(torch.tensor([ids])).logits[0, -1].double().softmax(0)
        handle.remove()
        assert np.allclose(prob[direction], expected[[good, bad]].numpy(), atol=1e-4)
    odds = prob[:, 0] / prob[:, 1]
    assert odds[0] < odds[1] < odds[2]
    perplexity = tree["generations"]["perplexity"].values[0]
    assert np.isfinite(perplexity).all()


def test_another_dtype_runs() -> None:
    half = model("llama", dtype=torch.bfloat16)
    tree = steering(half, text(CLEAN), vector=vectors(), multipliers=[1.0], decoding={"max_new_tokens": 3})
    assert np.isfinite(tree["effects/next_token"]["kl"].values).all()
