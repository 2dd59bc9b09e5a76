"""Generation with interventions: equal to transformers' own where nothing is done, and to hooked generation where something is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_models import CLEAN, CORRUPT, model

import nsp
from nsp.engine.generation import Decoding
from nsp.errors import InputError

STEPS = 6


def own(of: nsp.Model, prompt: list[int], hook: Any = None, layer: int = 0) -> list[int]:
    """transformers' greedy text, with an optional forward hook on one layer."""
    handle = of.module.model.layers[layer].register_forward_hook(hook) if hook else None
    try:
        given = torch.tensor([prompt])
        made = of.module.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, pad_token_id=0
        )
    finally:
        if handle:
            handle.remove()
    return list(made[0, len(prompt) :].tolist())


@pytest.fixture(scope="module")
def llama() -> nsp.Model:
    return model("llama")


def test_no_intervention_is_transformers_own_text(llama: nsp.Model) -> None:
    with llama.trace([CORRUPT, CORRUPT[:5]]) as t:
        t.generate(STEPS, stop=False)
    assert t.results["token_id"].dims == ("prompt", "step")
    assert t.results["token_id"].values.tolist() == [own(llama, CORRUPT), own(llama, CORRUPT[:5])]


def test_a_vector_on_every_token_is_a_hook_that_stays(llama: nsp.Model) -> None:
    vector = torch.randn(llama.geometry.d_model, generator=torch.Generator().manual_seed(1)) * 2
    with llama.trace(CORRUPT) as t:
        t.inject("resid_post[1]", vector)
        t.generate(STEPS, when="both", stop=False)
    expected = own(llama, CORRUPT, lambda _m, _a, output: output + vector, layer=1)
    assert t.results["token_id"].values.tolist() == expected
    assert expected != own(llama, CORRUPT)


def test_generated_tokens_alone_leave_the_prompt_as_it_was(llama: nsp.Model) -> None:
    vector = torch.randn(llama.geometry.d_model, generator=torch.Generator().manual_seed(2)) * 2

    def after_the_prompt(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + vector if output.shape[1] == 1 else output

    with llama.trace(CORRUPT) as t:
        t.inject("resid_post[1]", vector)
        t.generate(STEPS, when="generated", stop=False)
    assert t.results["token_id"].values.tolist() == own(llama, CORRUPT, after_the_prompt, layer=1)


def test_a_sweep_generates_one_text_a_cell(llama: nsp.Model) -> None:
    with llama.trace(CORRUPT) as t:
        t.sweep(nsp.patch("resid_post[*] @ 2:5", donor=CLEAN))
        t.generate(STEPS, stop=False)
    assert t.results["token_id"].dims == ("layer", "position", "step")
    donor = {}
    for layer in range(llama.geometry.n_layers):
        hook = llama.module.model.layers[layer].register_forward_hook(
            lambda _m, _a, output, layer=layer: donor.__setitem__(layer, output.detach())
        )
        llama.module(torch.tensor([CLEAN]))
        hook.remove()
    for layer in range(llama.geometry.n_layers):
        for position in (2, 3, 4):

            def put(_m: Any, _a: Any, output: torch.Tensor, layer: int = layer, position: int = position) -> torch.Tensor:
                if output.shape[1] == 1:
                    return output
                output = output.clone()
                output[0, position] = donor[layer][0, position]
                return output

            found = t.results["token_id"].sel(layer=layer, position=position).values.tolist()
            assert found == own(llama, CORRUPT, put, layer)


def test_a_patch_onto_itself_changes_no_text(llama: nsp.Model) -> None:
    layers = range(llama.geometry.n_layers)
    with llama.trace(CORRUPT) as t:
        t.record("resid_post[*] @ 4")
    states = torch.tensor(t.results["resid_post"].values).reshape(len(layers), 1, -1)
    with llama.trace([CORRUPT] * len(layers)) as t:  # one base prompt for each layer that is read
        t.sweep(nsp.inject("resid_post[*] @ 4", states, mode="set"), axes="layer")
        t.generate(STEPS, stop=False)
    for layer in layers:
        assert t.results["token_id"].values[layer, layer].tolist() == own(llama, CORRUPT)


def sampled(of: nsp.Model, prompts: list[list[int]], seed: int, **options: Any) -> np.ndarray:
    with of.trace(prompts, **options) as t:
        t.generate(STEPS, temperature=1.0, top_p=0.95, seed=seed, stop=False)
    return np.asarray(t.results["token_id"].values)


def test_sampling_is_seeded(llama: nsp.Model) -> None:
    first = sampled(llama, [CORRUPT, CLEAN], 3)
    assert (first == sampled(llama, [CORRUPT, CLEAN], 3)).all()
    assert any((first != sampled(llama, [CORRUPT, CLEAN], seed)).any() for seed in range(4, 8))


def test_a_small_budget_generates_the_same_texts(llama: nsp.Model) -> None:
    prompts = [CORRUPT, CLEAN, CORRUPT[:6], CLEAN[:7]]
    assert (sampled(llama, prompts, 5) == sampled(llama, prompts, 5, memory="40KB")).all()


def test_a_text_ends_at_the_end_token(llama: nsp.Model) -> None:
    end = own(llama, CORRUPT)[1]
    before = llama.module.generation_config.eos_token_id
    llama.module.generation_config.eos_token_id = end
    try:
        with llama.trace(CORRUPT) as t:
            t.generate(STEPS)
    finally:
        llama.module.generation_config.eos_token_id = before
    tokens = t.results["token_id"].values.tolist()
    stop = tokens.index(end)
    assert stop <= 1
    assert tokens[stop + 1 :] == [-1] * (STEPS - stop - 1)


def test_wrong_options_name_what_would_work(llama: nsp.Model) -> None:
    with pytest.raises(InputError, match="temperature"):
        Decoding(temperature=-1)
    with pytest.raises(InputError, match="'prompt', 'generated' or 'both'"):
        llama.trace(CORRUPT).generate(when="never")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="too small"), llama.trace(CORRUPT, memory="1KB") as t:
        t.generate(STEPS)
