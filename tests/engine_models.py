"""Tiny random models for the engine's tests: their effects are of order one, and a forward pass takes a millisecond."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hooks_reference import HookedReference
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import nsp

VOCABULARY, LAYERS, WIDTH, HEADS, KV_HEADS, NEURONS = 61, 3, 32, 4, 2, 48
# Two prompts of equal length that differ from token 2 on (and agree at token 4), so that a shared prefix can be pruned.
CLEAN = [5, 11, 23, 7, 40, 31, 3, 58, 19]
CORRUPT = [5, 11, 50, 9, 40, 12, 3, 6, 44]


def module(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny Llama (grouped-query attention) or GPT-2 whose weights are large enough for every site to matter."""
    torch.manual_seed(seed)
    if family == "llama":
        given = {
            "hidden_size": WIDTH,
            "intermediate_size": NEURONS,
            "num_hidden_layers": LAYERS,
            "vocab_size": VOCABULARY,
        }
        given |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64}
        config: Any = LlamaConfig(**{**given, "initializer_range": 0.25, "attention_bias": True, **options})
        made: Any = LlamaForCausalLM(config)
    else:
        given = {"n_embd": WIDTH, "n_inner": NEURONS, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY}
        given |= {"n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}
        config = GPT2Config(**{**given, "initializer_range": 0.25, **options})
        made = GPT2LMHeadModel(config)
    # Biases and norm weights start as zeros and ones, which would hide a mistake in them.
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.2)
    return made.to(dtype).eval()


def tokenizer() -> Any:
    """One token a word, ``w0`` to ``w58``, with offsets; text and ids give each other back."""
    words = [*(f"w{number}" for number in range(VOCABULARY - 2)), "<unk>", "<end>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")


def text(ids: list[int]) -> str:
    """The text of token ids."""
    return " ".join(f"w{token}" for token in ids)


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nsp.Model:
    """An nsp model around `module`."""
    return nsp.load(module(family, seed, dtype, **options), tokenizer=tokenizer())


def reference(of: nsp.Model) -> HookedReference:
    """The hooks reference of a model, on a float64 copy of its weights."""
    return HookedReference(copy.deepcopy(of.module).double())


class Both:
    """A model and its reference."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model = model(family)
        self.reference = reference(self.model)

    def submodule(self, layer: int = 1) -> str:
        """A ``module:`` path inside a layer."""
        inside = "model.layers.{}.mlp.gate_proj" if self.family == "llama" else "transformer.h.{}.mlp.act"
        return "module:" + inside.format(layer)

    def components(self) -> tuple[str, ...]:
        return self.reference.components()

    def units(self, component: str) -> int:
        """How many heads or neurons a component has; 0 where it has none."""
        if component in ("k", "v"):
            return self.reference.kv_heads
        if component in ("q", "z", "pattern"):
            return HEADS
        return NEURONS if component.startswith("mlp_") and component != "mlp_out" else 0


@functools.cache
def both(family: str) -> Both:
    """One `Both` a family for the whole session; tests leave the model as it is."""
    return Both(family)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models lose more to a second thread than they gain. For the modules that import it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
