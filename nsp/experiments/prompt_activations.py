"""One value of a component per prompt: its activation at the last token, or the mean or maximum over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.engine import Engine
from nsp.engine.recording import Recording
from nsp.errors import InputError
from nsp.progress import BranchProgress
from nsp.sites import Site

Over = Literal["last", "mean", "max"]


def prompt_values(
    engine: Engine,
    prompts: Sequence[Prompt],
    component: str,
    layers: Sequence[int],
    *,
    over: Over = "last",
    drop_first: int = 0,
    progress: BranchProgress | None = None,
) -> np.ndarray:
    """One value per prompt: float32 with dims (prompt, layer, neuron), as wide as the component's tensor.

    Args:
        over: the last token, or the mean or maximum over tokens.
        drop_first: tokens at the start that are left out of mean and maximum; InputError where a prompt has no others.
    """
    shortest = min(map(len, prompts))
    if over != "last" and shortest <= drop_first:
        raise InputError(f"a prompt of {shortest} token(s) is left with none when the first {drop_first} are dropped")
    units = engine.runtime.units(component)
    result = np.empty((len(prompts), len(layers), units.rows * units.width), np.float32)
    done = 0
    for kept in engine.recordings(prompts, [Site.of(component, layers)], stay=True):
        reduced = [_reduced(kept, component, layer, over, drop_first) for layer in layers]
        for number, values in enumerate(engine.runtime.fetch(reduced)):
            result[kept.rows, number] = values.cpu().numpy()
        done += len(kept.rows)
        if progress is not None:
            progress(done, len(prompts))
    return result


def _reduced(kept: Recording, component: str, layer: int, over: Over, drop_first: int) -> torch.Tensor:
    """A component at one layer with one value per prompt, float32 (prompt, width)."""
    if over == "last":
        return kept.at_last(component, layer).float()
    values = kept.at(component, layer).float()
    counted = kept.real.clone()
    counted[:, :drop_first] = False
    if over == "max":
        return values.masked_fill(~counted[:, :, None].to(values.device), float("-inf")).amax(dim=1)
    share = (counted.float() / counted.sum(dim=1, keepdim=True)).to(values.device)
    return torch.einsum("rp,rpw->rw", share, values)
