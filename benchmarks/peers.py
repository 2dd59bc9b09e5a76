"""The same patches by TransformerLens and by pyvene, where they are installed (``benchmarks/requirements-peers.txt``).

Each is used as its own documentation does it: TransformerLens 4 wraps the transformers model in a `TransformerBridge`
and patches with ``run_with_hooks`` from a cached donor; pyvene swaps with an `IntervenableModel`, which runs the donor
in every call.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

# A patch of resid_post: (base ids, donor ids, layer, position) -> logits at the last position.
Patcher = Callable[[Sequence[int], Sequence[int], int, int], torch.Tensor]


def installed() -> dict[str, Callable[[Any, Any], Patcher]]:
    """What makes a patcher from (transformers model, tokenizer), for each peer that is here."""
    known = {"transformer_lens": transformer_lens, "pyvene": pyvene}
    return {name: make for name, make in known.items() if importlib.util.find_spec(name) is not None}


def transformer_lens(module: Any, tokenizer: Any) -> Patcher:
    """``run_with_hooks`` on a bridge around a copy of the model."""
    from transformer_lens.model_bridge import TransformerBridge

    name = module.config._name_or_path or "model"
    bridge = TransformerBridge.boot_transformers(name, hf_model=copy.deepcopy(module), tokenizer=tokenizer)
    kept: dict[tuple[int, ...], Any] = {}

    def patch(base: Sequence[int], donor: Sequence[int], layer: int, position: int) -> torch.Tensor:
        if tuple(donor) not in kept:
            kept.clear()
            names = [f"blocks.{number}.hook_out" for number in range(module.config.num_hidden_layers)]
            kept[tuple(donor)] = bridge.run_with_cache(torch.tensor([list(donor)]), names_filter=names)[1]
        value = kept[tuple(donor)][f"blocks.{layer}.hook_out"]

        def swap(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            activation = activation.clone()
            activation[0, position] = value[0, position]
            return activation

        hooks = [(f"blocks.{layer}.hook_out", swap)]
        logits: torch.Tensor = bridge.run_with_hooks(torch.tensor([list(base)]), fwd_hooks=hooks)
        return logits[0, -1]

    return patch


def pyvene(module: Any, tokenizer: Any) -> Patcher:
    """An interchange by a `VanillaIntervention` at one layer's output."""
    import pyvene as library

    own = copy.deepcopy(module)
    made: dict[int, Any] = {}

    def patch(base: Sequence[int], donor: Sequence[int], layer: int, position: int) -> torch.Tensor:
        if layer not in made:
            made.clear()
            what = {"layer": layer, "component": "block_output", "intervention_type": library.VanillaIntervention}
            made[layer] = library.IntervenableModel(library.IntervenableConfig([what]), model=own)
        inputs = {"input_ids": torch.tensor([list(base)])}
        sources = [{"input_ids": torch.tensor([list(donor)])}]
        logits: torch.Tensor = made[layer](inputs, sources, {"sources->base": position})[1].logits
        return logits[0, -1]

    return patch
