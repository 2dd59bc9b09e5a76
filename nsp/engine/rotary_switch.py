"""Rotary embeddings whose frequencies depend on the length of what is read: LongRoPE and dynamic NTK.

transformers chooses them from the longest prompt of a batch. Beyond the length at which they change, a prompt's numbers
would depend on its neighbours, and a branch's on where it ends: such prompts run by themselves, on the plain path, or
are refused. Sources: Ding et al. 2024 (LongRoPE); transformers, ``modeling_rope_utils.dynamic_rope_update``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsp.errors import InputError


@dataclass(frozen=True)
class RotarySwitch:
    """The length beyond which a model's rotary frequencies are others.

    Attributes:
        kind: ``longrope``: one other set of frequencies; ``dynamic``: others for each length.
        length: the most tokens that are read with the original frequencies.
    """

    kind: str
    length: int

    def check(self, lengths: Sequence[int]) -> None:
        """InputError where prompts that run together would change each other's numbers."""
        longer = {length for length in lengths if length > self.length}
        alike = not longer or ((len(longer) == 1 or self.kind == "longrope") and min(lengths) > self.length)
        if not alike:
            raise InputError(
                f"this model's rotary embedding ({self.kind}) has other frequencies beyond {self.length} tokens, and prompts of "
                f"{min(lengths)} to {max(lengths)} tokens would change each other's numbers; run them apart"
            )

    def check_continuation(self, longest: int, steps: int) -> None:
        """InputError where a text would grow beyond the switch, or begins there."""
        if longest + steps - 1 > self.length:
            raise InputError(
                f"this model's rotary embedding ({self.kind}) has other frequencies beyond {self.length} tokens: a prompt of "
                f"{longest} tokens cannot be continued by {steps}"
            )


def rotary_switch(config: Any) -> RotarySwitch | None:
    """The switch of a model by its configuration; None where its frequencies are the same for every length."""
    stated = getattr(config, "rope_parameters", None) or {}
    kind = stated.get("rope_type") if isinstance(stated, dict) else None
    if kind == "longrope" and stated.get("short_factor") != stated.get("long_factor"):
        return RotarySwitch(kind, int(stated["original_max_position_embeddings"]))
    if kind == "dynamic":
        return RotarySwitch(kind, int(stated.get("original_max_position_embeddings") or config.max_position_embeddings))
    return None


def forget_lengths(module: torch.nn.Module) -> None:
    """Take a dynamic rotary embedding back to its original frequencies: it keeps those of the longest text that it has
    read, whatever it reads next.
    """
    for part in module.modules():
        original = getattr(part, "original_inv_freq", None)
        if isinstance(original, torch.Tensor) and hasattr(part, "max_seq_len_cached"):
            buffer: Any = part.get_buffer("inv_freq")
            part.register_buffer("inv_freq", original.to(buffer.device), persistent=False)
            part.max_seq_len_cached = part.original_max_seq_len
