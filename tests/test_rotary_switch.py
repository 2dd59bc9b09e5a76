"""Rotary embeddings that depend on the length read: each prompt's numbers are transformers' own, whatever ran beside or
before it, or the run is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import nsp
from nsp.errors import InputError

LENGTHS = {"longrope": 32, "dynamic": 12}


def module(kind: str) -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        config: Any = LlamaConfig(**size, initializer_range=0.5, max_position_embeddings=12, rope_parameters=rope)
        return LlamaForCausalLM(config).eval().requires_grad_(False)
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = Phi3Config(
        **size, num_key_value_heads=2, initializer_range=0.5, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, original_max_position_embeddings=32, rope_parameters=rope,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval().requires_grad_(False)


def ids(length: int, step: int = 7) -> list[int]:
    return [(place * step) % 80 + 5 for place in range(length)]


def expected(kind: str, tokens: list[int]) -> float:
    """A fresh model's logit: it has read nothing before."""
    return float(module(kind)(torch.tensor([tokens])).logits[0, -1, 7])


def logit(model: nsp.Model, tokens: list[int]) -> float:
    with model.trace(tokens) as t:
        t.measure(nsp.logit(7))
    return float(t.results["logit"].item())


@pytest.mark.parametrize("kind", LENGTHS)
def test_each_length_gives_transformers_numbers_whatever_was_read_before(kind: str) -> None:
    model, switch = nsp.load(module(kind)), LENGTHS[kind]
    for length in (switch - 2, switch + 8, switch + 3, switch - 2, switch + 20):
        assert logit(model, ids(length)) == pytest.approx(expected(kind, ids(length)), abs=2e-5)


@pytest.mark.parametrize("kind", LENGTHS)
def test_prompts_on_both_sides_do_not_run_together(kind: str) -> None:
    model, switch = nsp.load(module(kind)), LENGTHS[kind]
    with (
        pytest.raises(InputError, match=f"other frequencies beyond {switch} tokens"),
        model.trace([ids(switch - 2), ids(switch + 8)]) as t,
    ):
        t.measure(nsp.logit(7))
    pairs = [
        nsp.pair(clean=ids(length), corrupt=ids(length, 11), answer=7, distractor=9) for length in (switch - 2, switch + 8)
    ]
    with pytest.raises(InputError, match="run them apart"):
        nsp.experiments.activation_patching(model, pairs, positions="last")


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("beyond", [-2, 6])
def test_a_sweep_is_exact_on_either_side(kind: str, beyond: int) -> None:
    model, length = nsp.load(module(kind)), LENGTHS[kind] + beyond
    clean, corrupt = ids(length), ids(length, 11)
    with model.trace(corrupt) as t:
        t.sweep(nsp.patch("resid_post[1] @ 3,-1", donor=clean))
        t.measure(nsp.logit(7))
    reference = module(kind)
    with torch.no_grad():
        donor = reference(torch.tensor([clean]), output_hidden_states=True).hidden_states[2][0]
    for cell, position in enumerate((3, length - 1)):

        def replaced(_module: Any, _given: Any, out: Any, at: int = position) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            hidden[0, at] = donor[at]
            return out

        hook = reference.model.layers[1].register_forward_hook(replaced)
        true = reference(torch.tensor([corrupt])).logits[0, -1, 7]
        hook.remove()
        assert np.ravel(t.results["logit"].values)[cell] == pytest.approx(float(true), abs=5e-5)


@pytest.mark.parametrize("kind", LENGTHS)
def test_text_does_not_grow_across_the_switch(kind: str) -> None:
    model, switch = nsp.load(module(kind)), LENGTHS[kind]
    with pytest.raises(InputError, match="cannot be continued by 10"), model.trace(ids(switch - 4)) as t:
        t.generate(10, stop=False)
    with model.trace(ids(switch - 6)) as t:
        t.generate(4, stop=False)
    own = module(kind).generate(
        torch.tensor([ids(switch - 6)]), attention_mask=torch.ones(1, switch - 6), do_sample=False, max_new_tokens=4, eos_token_id=None
    )
    assert t.results["token_id"].values.tolist() == own[0, switch - 6 :].tolist()
