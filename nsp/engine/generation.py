"""Generation with interventions active, for many branches at once.

The prompt runs once (the trunk); each branch's changed suffix runs in packed passes that keep their keys and values;
then all branches decode together, one token per step, over the trunk's keys and values and their own. Greedy, or
sampled from seeded draws that do not depend on batching.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache

from nsp.engine.branches import Branches, Ints
from nsp.engine.budget import Budget, size_text
from nsp.engine.forward_pass import check_continuation, empty_entry, program_of
from nsp.engine.masks import layer_masks
from nsp.engine.pack import Pass, lone_row
from nsp.engine.passes import Places, lower_pass, place_writes
from nsp.engine.program import Choice, Outputs, Program
from nsp.engine.readout import readout_at
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY
from nsp.engine.trunk import run_bases
from nsp.errors import InputError, NspError

When = Literal["prompt", "generated", "both"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: tokens generated.
        temperature: 0 is greedy; else logits are divided by it and a token is drawn.
        top_k, top_p: keep the k most likely tokens, or the smallest set with probability p; None keeps all.
        seed: of the draws; one draw per branch and step, so batching cannot change a text.
        stop: end a text at the model's end-of-sequence token (later places hold -1).
    """

    max_new_tokens: int = 20
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
                raise InputError(f"{name} must be a whole number, not {value!r}")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:  # NaN is neither
            raise InputError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, not {self.top_k}")


def generate(
    runtime: Runtime,
    branches: Branches,
    decoding: Decoding,
    budget: Budget,
    *,
    when: When = "prompt",
    progress: Progress | None = None,
) -> np.ndarray:
    """Generated token ids of every branch, with axes (branch, step); -1 after the end of a text.

    The branches measure nothing, so that each runs to the end of its prompt. ``when``: whether interventions act on the
    prompt, on every generated token (at the sites' layers and units, whatever their positions), or on both. Branches of one
    stream (`Branches.streams`) draw the same numbers.

    Raises InputError on a model that the branch path does not run on: generation needs its keys and values.
    """
    assert branches.whole, "text is generated from whole prompts: state no metrics"
    check_continuation(runtime, int(branches.bases.lengths.max()), decoding.max_new_tokens)
    if runtime.branch_refusal:
        raise InputError(f"generation with interventions needs the branch path, which cannot run here: {runtime.branch_refusal}")
    streams = np.arange(len(branches)) if branches.streams is None else branches.streams
    result = np.full((len(branches), decoding.max_new_tokens), -1, dtype=np.int64)
    acting = branches if when != "generated" else branches.with_writes([])
    written = _on_generated(branches) if when != "prompt" else None
    with runtime.attention_for(branches.components):
        run_bases(runtime, branches.bases, budget)
        rows = rows_at_once(runtime, branches, decoding, budget)
        order = np.argsort(acting.join, kind="stable")
        done = 0
        # Chunks of equal size, so that the last one does not decode a few branches alone.
        rows = -(-len(branches) // -(-len(branches) // rows))
        for low in range(0, len(order), rows):
            chunk = np.sort(order[low : low + rows])
            prefilled = prefill(runtime, acting, chunk)
            result[chunk] = _decode(runtime, prefilled, written, chunk, streams[chunk], decoding)
            done += len(chunk)
            if progress is not None:
                progress(done, len(branches))
    return result


def rows_at_once(runtime: Runtime, branches: Branches, decoding: Decoding, budget: Budget) -> int:
    """Branches that decode together: their keys and values (and one copy while a step extends them) must fit."""
    geometry, size = runtime.geometry, runtime.dtype.itemsize
    length = int(branches.bases.lengths.max()) + decoding.max_new_tokens
    cache = 2 * geometry.n_layers * geometry.n_kv_heads * geometry.head_dim * length * size
    rows = int(budget.bytes / (cache * 1.5 + 8 * geometry.vocab_size))
    if rows < 1:
        raise InputError(
            f"the memory budget of {size_text(budget.bytes)} is too small to generate {decoding.max_new_tokens} tokens for one branch "
            f"({size_text(cache)}); give --memory more"
        )
    return min(rows, 4096 if runtime.device.type == "cuda" else 512)


@dataclass(eq=False)
class Prefilled:
    """Branches whose prompts have run, one for each row: what they decode from.

    Attributes:
        cache: their keys and values, extended by every step; ``width`` columns of it are of prompts.
        lengths: tokens of each prompt, (row,).
        hidden: the final residual at each prompt's last token, (row, width).
    """

    cache: DynamicCache
    width: int
    lengths: torch.Tensor
    hidden: torch.Tensor


def _decode(
    runtime: Runtime, prefilled: Prefilled, written: Branches | None, chunk: Ints, streams: Ints, decoding: Decoding
) -> np.ndarray:
    """The texts of some branches, (branch, step); ``written`` is what acts on every generated token."""
    uniform = torch.as_tensor(_draws(decoding, streams))
    ends = list(_end_tokens(runtime)) if decoding.stop else []
    alive = np.ones(len(chunk), dtype=bool)
    tokens = np.full((len(chunk), decoding.max_new_tokens), -1, dtype=np.int64)

    def keep(step: int, chosen: torch.Tensor) -> None:
        """Put one step's tokens in place for the texts that have not ended, and end those that end with it."""
        step_tokens = chosen.cpu().numpy()
        if (step_tokens[alive] < 0).any():
            raise NspError(f"the model's logits are NaN at generated token {step}, so no token can be chosen")
        tokens[alive, step] = step_tokens[alive]
        alive[np.isin(step_tokens, ends)] = False

    # On a server every step runs before the first token comes here; elsewhere a step is read before the next one runs.
    ahead = runtime.together > 1
    steps: list[torch.Tensor] = []
    for step in range(decoding.max_new_tokens):
        choice: Choice = {
            "temperature": decoding.temperature,
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
            "uniform": uniform[:, step],
        }
        if step == 0:
            outputs = read_head(runtime, prefilled.hidden, choice)
        else:
            outputs = runtime.execute(_step(runtime, prefilled, steps[-1], step - 1, written, chunk, choice))
        assert outputs["chosen"] is not None
        steps.append(outputs["chosen"])
        if not ahead:
            keep(step, steps[-1])
            if not alive.any():
                break
    if ahead:
        for step, chosen in enumerate(runtime.fetch(steps)):
            keep(step, chosen)
    return tokens


def prefill(runtime: Runtime, branches: Branches, chunk: Ints) -> Prefilled:
    """Run the changed suffixes of some branches over the keys and values of their trunk."""
    assert branches.bases.trunk is not None, "the bases have not run yet"
    n_layers, device, trunk = runtime.geometry.n_layers, runtime.device, branches.bases.trunk.bases
    bases = torch.as_tensor(branches.base[chunk])
    at = bases.to(device)
    width = int(trunk.lengths[bases].max())
    keys = [trunk.keys[layer][at, :, :width].clone() for layer in range(n_layers)]
    values = [trunk.cached_values[layer][at, :, :width].clone() for layer in range(n_layers)]
    lengths = trunk.lengths[bases].to(device)
    hidden = trunk.values[(BOUNDARY, n_layers)][at, lengths - 1].clone()
    live = np.flatnonzero(~branches.pruned[chunk])
    if len(live):
        order = live[np.argsort(branches.join[chunk[live]], kind="stable")]
        rows = tuple(lone_row(branches, branch) for branch in chunk[order].tolist())
        packed = Pass(rows, max(row.width for row in rows), max(row.past for row in rows))
        program = lower_pass(runtime, branches, packed).program
        last = torch.tensor([row.width - 1 for row in rows], device=device)
        numbers = torch.arange(len(rows), device=device)
        program["final"]["reads"].append({"kind": "read", "batch": numbers, "column": last})
        outputs = runtime.execute(program)
        target = torch.as_tensor(order, device=device)
        hidden[target] = outputs["reads"][0]
        _merge(program["inputs"]["past_key_values"], packed, target, keys, values)
    cache = DynamicCache()
    for layer in range(n_layers):
        cache.update(keys[layer], values[layer], layer)
    return Prefilled(cache, width, lengths, hidden)


def _merge(
    own: DynamicCache, packed: Pass, target: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
) -> None:
    """Write the branches' own keys and values over the trunk's, at their positions."""
    widths = torch.tensor([row.width for row in packed.rows])
    numbers = torch.arange(len(widths)).repeat_interleave(widths)
    columns = torch.cat([torch.arange(row.width) for row in packed.rows])
    positions = columns + torch.tensor([row.past for row in packed.rows])[numbers]
    joins = torch.tensor([row.join for row in packed.rows])[numbers]
    for layer in range(packed.start, len(keys)):
        inside = joins <= layer
        if not bool(inside.any()):
            continue
        held = own.layers[layer]
        source, column, place = numbers[inside], columns[inside] + packed.past, positions[inside]
        keys[layer][target[source], :, place] = held.keys[source, :, column]
        values[layer][target[source], :, place] = held.values[source, :, column]


def _step(
    runtime: Runtime, state: Prefilled, tokens: torch.Tensor, step: int, written: Branches | None, chunk: Ints, choice: Choice
) -> Program:
    """The program of one generated token of every branch, which chooses the next one."""
    rows = len(tokens)
    entries = [empty_entry(runtime, layer, rows) for layer in range(runtime.geometry.n_layers + 1)]
    if written is not None:
        place_writes(runtime, written, entries, chunk, Places(written, chunk, np.arange(rows), None), None)
    inputs = {
        "input_ids": tokens[:, None],
        "position_ids": (state.lengths + step)[:, None],
        "attention_mask": _step_mask(runtime, state, step),
        "past_key_values": state.cache,
        "use_cache": True,
    }
    numbers = torch.arange(rows, device=runtime.device)
    readout = readout_at(runtime, numbers, torch.zeros_like(numbers), choice=choice)
    return program_of(runtime, inputs, entries, readout)


def _step_mask(runtime: Runtime, state: Prefilled, step: int) -> Any:
    """None where every prompt has one length and no window cuts in: attention then needs no mask and no copies of its
    keys.
    """
    windows = {window for window in runtime.geometry.windows if window is not None}
    lengths, total = state.lengths, state.width + step + 1
    if bool((lengths == state.width).all()) and all(total <= window for window in windows):
        return None
    column = torch.arange(total, device=lengths.device)
    # Generated tokens lie behind the widest prompt; a shorter prompt's padding columns are never seen.
    sees = (column[None, :] < lengths[:, None]) | (column[None, :] >= state.width)
    keys_at = torch.where(
        column[None, :] < state.width, column[None, :], column[None, :] - state.width + lengths[:, None]
    )
    return layer_masks(runtime, sees[:, None, :], (lengths + step)[:, None], keys_at)


def read_head(runtime: Runtime, hidden: torch.Tensor, choice: Choice | None = None) -> Outputs:
    """What the head makes of final residuals with axes (row, width), in a pass that skips every layer.

    Gives the chosen tokens, or without a choice the float32 logits (row, token).
    """
    numbers = torch.arange(len(hidden), device=runtime.device)
    inputs = {"input_ids": torch.zeros_like(numbers)[None], "use_cache": False}
    readout = readout_at(runtime, torch.zeros_like(numbers), numbers, logits=choice is None, choice=choice)
    final = empty_entry(runtime, runtime.geometry.n_layers, 1)
    return runtime.execute(program_of(runtime, inputs, [final], readout, first=hidden[None]))


def _on_generated(branches: Branches) -> Branches:
    """The branches as they act on a generated token: each one's layers and units once, with the values of the last
    position named.
    """
    kept = []
    for writes in branches.writes:
        if writes.component == "pattern":
            raise InputError("the attention pattern cannot be changed on generated tokens; use when='prompt'")
        keys = np.stack([writes.branch, writes.layer, writes.unit], axis=1)[::-1]
        _, first = np.unique(keys, axis=0, return_index=True)
        mask = np.zeros(len(writes), dtype=bool)
        mask[len(writes) - 1 - first] = True
        kept.append(writes.where(mask))
    return branches.with_writes(kept)


def _draws(decoding: Decoding, streams: Ints) -> np.ndarray:
    """One uniform number per stream and step, the same whatever runs beside it."""
    if decoding.temperature == 0:
        return np.zeros((len(streams), decoding.max_new_tokens))
    return np.stack(
        [np.random.default_rng([decoding.seed, int(stream)]).random(decoding.max_new_tokens) for stream in streams]
    )


def _end_tokens(runtime: Runtime) -> set[int]:
    config = getattr(runtime.module, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = getattr(runtime.tokenizer, "eos_token_id", None)
    if ends is None:
        return set()
    return {int(token) for token in ends} if isinstance(ends, list | tuple) else {int(ends)}
