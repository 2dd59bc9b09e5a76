"""A tiny model with a planted refusal, its prompts, and the recipe's keys that fit it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import engine_models
import numpy as np
import torch
from hooks_reference import HookedReference
from planted_refusal import plant

import nsp
from nsp.experiments.direction.experiment import Direction
from nsp.experiments.direction.recipe import DirectionRecipe

WORD, REFUSAL = 50, 51


@dataclass(frozen=True)
class Planted:
    """A model whose replies open with ``w51`` where the prompt holds ``w50``; the direction that does it."""

    model: nsp.Model
    direction: torch.Tensor
    reference: HookedReference


def tiny_module() -> Any:
    """Small weights, so that the plant stands out, and a head that prefers other words clearly."""
    module = engine_models.module("llama", 0, initializer_range=0.02, hidden_size=64, num_hidden_layers=4)
    with torch.no_grad():
        module.lm_head.weight *= 10
    return module


@functools.cache
def planted() -> Planted:
    module = tiny_module()
    direction = plant(
        module, word=WORD, refusal=REFUSAL, neutral=[3, 9, 27, 8, 40, 1, 7], layer=1, carried=2.0, sought=2.0, copied=1.0, read=1.5
    )  # fmt: skip
    model = nsp.load(module, tokenizer=engine_models.tokenizer())
    return Planted(model, direction, engine_models.reference(model))


def prompts(count: int, word: int | None, seed: int) -> list[str]:
    """Texts of random words and lengths, with ``word`` somewhere before the last three tokens."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        begin = [int(token) for token in rng.integers(0, 45, size=int(rng.integers(5, 9)))]
        end = [int(token) for token in rng.integers(0, 45, size=3)]
        texts.append(engine_models.text([*begin, *([] if word is None else [word]), *end]))
    return texts


OPTIONS: dict[str, Any] = {
    "chat": {"template": False},
    "positions": 3,
    "generate": {"max_new_tokens": 3},
    "select": {"max_kl": 0.3, "below": 1.0},
}


def keys(**options: Any) -> dict[str, Any]:
    """A recipe for the tiny model."""
    return {
        "kind": "direction",
        "positive": prompts(16, WORD, 1),
        "negative": prompts(16, None, 2),
        "behaviour": {"name": "refusal", "openings": ["w51"]},
        **OPTIONS,
        **options,
    }


def job(model: nsp.Model | None = None, **options: Any) -> Direction:
    return Direction(planted().model if model is None else model, DirectionRecipe.model_validate(keys(**options)))
