"""What a prompt, an answer and a way of generating may be: it works, or one clear message says so before anything runs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nsp
from nsp.errors import InputError
from nsp.experiments.prompt_options import ChatOptions, encode_prompts

IDS, OTHER = [5, 9, 11], [5, 8, 11]


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 96, **size, **options})).eval()


@pytest.mark.parametrize(
    "given",
    [np.array, lambda ids: torch.tensor([ids]), torch.tensor, lambda ids: {"input_ids": torch.tensor([ids])}, tuple],
    ids=["numpy", "tensor of a batch", "tensor", "what a tokenizer returns", "tuple"],
)
def test_experiments_take_the_prompts_that_pairs_take(given: Any) -> None:
    model = nsp.load(llama())
    trees = [
        nsp.experiments.activation_patching(
            model, nsp.pair(clean=clean, corrupt=corrupt, answer=np.int64(7), distractor=torch.tensor(9)), positions="last"
        )
        for clean, corrupt in ((given(IDS), given(OTHER)), (IDS, OTHER))
    ]
    np.testing.assert_array_equal(*(tree["effects/resid_post"]["effect"].values for tree in trees))


@pytest.fixture
def own_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer that a test may change."""
    return copy.deepcopy(tokenizer)


def test_a_padding_token_without_an_embedding_is_masked_like_any_other(own_tokenizer: Any) -> None:
    own_tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = nsp.load(llama(vocab_size=49152), tokenizer=own_tokenizer)
    texts = ["Paris is", "The capital of France is"]
    with model.trace(texts) as together:
        together.measure(nsp.logit(7))
    for text, logit in zip(texts, together.results["logit"].values, strict=True):
        with model.trace(text) as alone:
            alone.measure(nsp.logit(7))
        assert alone.results["logit"].item() == pytest.approx(float(logit), abs=1e-5)


def test_a_position_table_ends_where_it_ends() -> None:
    model = nsp.load(GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval())
    with pytest.raises(InputError, match="cannot be continued by 20; the model reads at most 16"), model.trace(IDS) as t:
        t.generate(20, stop=False)


def test_a_dynamic_rotary_embedding_reads_what_transformers_reads() -> None:
    module = llama(
        max_position_embeddings=12, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    )
    ids = list(range(5, 25))
    with nsp.load(module).trace(ids) as t:
        t.measure(nsp.logit(7))
    with torch.no_grad():
        expected = module(torch.tensor([ids])).logits[0, -1, 7]
    assert t.results["logit"].item() == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"temperature": float("nan")}, {"temperature": float("inf")}, {"max_new_tokens": 2.5}, {"top_k": 1.5}, {"max_new_tokens": True}],
)
def test_what_is_no_way_of_generating_is_an_input_error(options: dict[str, Any]) -> None:
    steps = options.pop("max_new_tokens", 4)
    with pytest.raises(InputError), nsp.load(llama()).trace(IDS) as t:
        t.generate(steps, **options)


def test_a_template_that_takes_no_system_message_says_so(own_tokenizer: Any) -> None:
    own_tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    model = nsp.load(llama(vocab_size=49152), tokenizer=own_tokenizer)
    with pytest.raises(InputError, match="System role not supported"):
        encode_prompts(model, ["Tell me"], ChatOptions(template=True, system="Be kind."))
