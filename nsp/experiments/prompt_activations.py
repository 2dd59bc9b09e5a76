"""Activations of ordinary runs, prompt by prompt, in batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.budget import Budget
from nsp.engine.recording import record
from nsp.engine.slots import Slot, slot_of
from nsp.errors import InputError
from nsp.experiments.job import BranchProgress
from nsp.model import Model

# Bytes of activations that are held at a time.
_HELD = 256 * 2**20


def batches(
    model: Model, prompts: Sequence[Prompt], component: str, layers: Sequence[int], budget: Budget
) -> Iterator[tuple[list[int], torch.Tensor, list[torch.Tensor]]]:
    """Run the prompts and give, batch by batch, which they are (row,), which of their columns are tokens (row, position)
    and the component's tensor at each layer, (row, position, width).
    """
    runtime = model.runtime
    slots: list[Slot] = [slot_of(component, layer) for layer in layers]
    units = runtime.units(component)
    each = len(layers) * units.rows * units.width * runtime.dtype.itemsize
    # Prompts of like length run together, so that little of a batch is padding.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    low = 0
    while low < len(order):
        longest = len(prompts[order[low]])
        size = max(1, min(budget.plain_rows(runtime, longest), min(_HELD, budget.bytes // 2) // (longest * each)))
        rows = order[low : low + size]
        low += size
        kept = record(runtime, [prompts[row].token_ids for row in rows], slots, max_tokens=longest * size)
        real = torch.arange(kept.ids.shape[1])[None, :] < kept.lengths[:, None]
        yield rows, real, [kept.values[slot] for slot in slots]


def prompt_values(
    model: Model,
    prompts: Sequence[Prompt],
    component: str,
    layers: Sequence[int],
    budget: Budget,
    *,
    mean: bool = False,
    drop_first: int = 0,
    progress: BranchProgress | None = None,
) -> np.ndarray:
    """One value a prompt: float32 with dims (prompt, layer, neuron), at the last position or the mean over positions.

    ``drop_first`` leaves the first tokens out of the mean; InputError where a prompt has no more than those.
    """
    if mean:
        short = min(prompts, key=len)
        if len(short) <= drop_first:
            raise InputError(f"a prompt of {len(short)} token(s) is left with none when the first {drop_first} are dropped")
    units = model.runtime.units(component)
    found = np.empty((len(prompts), len(layers), units.rows * units.width), np.float32)
    done = 0
    for rows, real, values in batches(model, prompts, component, layers, budget):
        lengths = real.sum(dim=1)
        for number, value in enumerate(values):
            if mean:
                weight = real.clone()
                weight[:, :drop_first] = False
                share = (weight.float() / weight.sum(dim=1, keepdim=True)).to(value.device)
                taken = torch.einsum("rp,rpw->rw", share, value.float())
            else:
                taken = value[torch.arange(len(rows), device=value.device), (lengths - 1).to(value.device)].float()
            found[rows, number] = taken.cpu().numpy()
        done += len(rows)
        if progress is not None:
            progress(done, len(prompts))
    return found
