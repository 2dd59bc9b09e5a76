"""Recording: whole runs of prompts, ordinary or with writes on the way, and what is kept of them.

Everything that reads activations, keys and values or logits of whole runs comes through `record`, or `recordings` where
what is kept of all prompts would not fit into memory. Prompts of several lengths run together (see `forward_pass`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Bases, Branches, Ints, Writes
from nsp.engine.budget import Budget
from nsp.engine.forward_pass import check_ids, pad_token, padded_ids
from nsp.engine.passes import lower_rows
from nsp.engine.program import MetricStep, Readout
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot, slot_of

Prompts = Sequence[Prompt] | Sequence[Sequence[int]]
# Columns of a pass where no budget says how many.
_COLUMNS = 8192
# Bytes of activations that `recordings` hands out at a time.
_HELD = 256 * 2**20


@dataclass
class Recording:
    """What was kept of some prompts' runs.

    Attributes:
        ids: token ids with axes (prompt, position), right-padded; ``lengths`` the true lengths (prompt,).
        values: slot -> tensor with axes (prompt, position, width); ``pattern`` slots (prompt, head, position, key
            position).
        keys, cached_values: per layer (prompt, head, position, width), where they were asked for.
        logits: (readout, token) float32, where asked for; ``metrics`` one float32 tensor (readout,) for each metric.
        rows: which of the prompts these are, (prompt,), where they were recorded in several batches.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    values: dict[Slot, torch.Tensor] = field(default_factory=dict)
    keys: list[torch.Tensor] = field(default_factory=list)
    cached_values: list[torch.Tensor] = field(default_factory=list)
    logits: torch.Tensor | None = None
    metrics: list[torch.Tensor] = field(default_factory=list)
    rows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def at(self, component: str, layer: int) -> torch.Tensor:
        """A component's tensor at one layer: (prompt, position, width)."""
        return self.values[slot_of(component, layer)]

    def at_last(self, component: str, layer: int) -> torch.Tensor:
        """A component at one layer and each prompt's last token: (prompt, width)."""
        values = self.at(component, layer)
        return values[torch.arange(len(values), device=values.device), (self.lengths - 1).to(values.device)]

    @property
    def real(self) -> torch.Tensor:
        """Which columns are tokens of the prompts and no padding: bool (prompt, position) on the CPU."""
        return torch.arange(self.ids.shape[1])[None, :] < self.lengths[:, None]

    def only(self, rows: Ints) -> Recording:
        """The given prompts' rows, in that order, of what branches read: the residual stream between layers, keys and
        values. The recording itself where that is all of them.
        """
        if len(rows) == len(self.ids) and (rows == np.arange(len(rows))).all():
            return self
        at: torch.Tensor | slice = torch.as_tensor(rows, device=self.ids.device)
        if len(rows) == 1:
            at = slice(int(rows[0]), int(rows[0]) + 1)  # a view
        return Recording(
            self.ids[at],
            self.lengths[at.cpu() if isinstance(at, torch.Tensor) else at],
            {slot: value[at] for slot, value in self.values.items() if slot[0] == BOUNDARY},
            [value[at] for value in self.keys],
            [value[at] for value in self.cached_values],
        )

    @property
    def bytes(self) -> int:
        """Memory the recording holds."""
        tensors = [*self.values.values(), *self.keys, *self.cached_values]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def record(
    runtime: Runtime,
    prompts: Prompts,
    slots: Collection[Slot] = (),
    *,
    writes: Sequence[Writes] = (),
    readout: Readout | None = None,
    keep_cache: bool = False,
    budget: Budget | None = None,
    stay: bool = False,
) -> Recording:
    """Run whole prompts once, in batches, and keep what is asked for.

    Args:
        slots: what to keep, as it is after the writes.
        writes: what changes on the way; ``branch`` is the prompt's row.
        readout: places of ``prompts``, in ascending order of their rows, whose logits or metrics are kept.
        keep_cache: keep every layer's keys and values; they stay where the model is.
        budget: the memory that a batch may take; None takes a few thousand tokens at a time.
        stay: leave the values where the model is, for programs that read them; else they come here from a server.

    Raises:
        InputError: token ids that the model has no embedding for, or a prompt longer than it can read.
    """
    tokens = token_ids(runtime, prompts)
    ids, lengths = padded_ids(tokens, pad_token(runtime), runtime.device)
    if not slots and not keep_cache and readout is None:
        return Recording(ids, lengths)  # nothing is asked of the run
    columns = ids.shape[1]
    size = max(1, _COLUMNS // columns) if budget is None else budget.plain_rows(runtime, columns)
    run = _Run(runtime, _branches(runtime, tokens, writes), set(slots), keep_cache, stay)
    parts = []
    for low in range(0, len(ids), size):
        rows = np.arange(low, min(low + size, len(ids)))
        batch = slice(low, low + size)
        parts.append(run.of(ids[batch], lengths[batch], rows, _readout_of(readout, rows)))
    return parts[0] if len(parts) == 1 else _joined(ids, lengths, parts)


def recordings(
    runtime: Runtime,
    prompts: Prompts,
    slots: Collection[Slot],
    budget: Budget,
    *,
    writes: Sequence[Writes] = (),
    stay: bool = False,
) -> Iterator[Recording]:
    """`record` batch by batch, as many prompts at a time as the budget allows; ``rows`` says which each batch holds.

    Prompts of like length run together, so that little of a batch is padding.
    """
    tokens = token_ids(runtime, prompts)
    run = _Run(runtime, _branches(runtime, tokens, writes), set(slots), stay=stay)
    each = sum(_width(runtime, component) for component, _ in run.slots) * runtime.dtype.itemsize
    order = np.array(sorted(range(len(tokens)), key=lambda row: -len(tokens[row])), dtype=np.int64)
    low = 0
    while low < len(order):
        longest = len(tokens[order[low]])
        held = min(_HELD, budget.bytes // 2) // (longest * each)
        rows = order[low : low + max(1, min(budget.plain_rows(runtime, longest), held))]
        low += len(rows)
        ids, lengths = padded_ids([tokens[row] for row in rows], pad_token(runtime), runtime.device)
        yield run.of(ids, lengths, rows)


def token_ids(runtime: Runtime, prompts: Prompts) -> list[Sequence[int]]:
    """The prompts' token ids; InputError for ids that the model has no embedding for, or a prompt longer than it can read."""
    tokens = [prompt.token_ids if isinstance(prompt, Prompt) else prompt for prompt in prompts]
    check_ids(runtime, tokens)
    return tokens


def _branches(runtime: Runtime, tokens: Sequence[Sequence[int]], writes: Sequence[Writes]) -> Branches:
    """The prompts as branches, one for each, with their writes."""
    return Branches(Bases(tokens, runtime.geometry.n_layers), np.arange(len(tokens)), list(writes))


def _width(runtime: Runtime, component: str) -> int:
    if component == BOUNDARY:
        return runtime.geometry.d_model
    units = runtime.units(component)
    return units.rows * units.width


@dataclass(frozen=True, eq=False)
class _Run:
    """What is recorded of every batch; ``branches`` hold the writes of all prompts."""

    runtime: Runtime
    branches: Branches
    slots: set[Slot]
    keep_cache: bool = False
    stay: bool = False

    def of(self, ids: torch.Tensor, lengths: torch.Tensor, rows: Ints, readout: Readout | None = None) -> Recording:
        """Record one batch: ``ids`` and ``lengths`` of the prompts ``rows``, in one pass."""
        runtime = self.runtime
        lowered = lower_rows(runtime, self.branches, rows, ids, lengths, self.slots)
        program, cache = lowered.program, DynamicCache() if self.keep_cache else None
        program["readout"] = readout
        if cache is not None:
            program["inputs"] |= {"past_key_values": cache, "use_cache": True}
        with runtime.attention_for({*self.branches.components, *(component for component, _ in self.slots)}):
            outputs = runtime.execute(program)
        reads = lowered.values(outputs)
        values = list(reads.values()) if self.stay else runtime.fetch(list(reads.values()))
        kept = Recording(ids, lengths, dict(zip(reads, values, strict=True)), rows=rows)
        kept.logits, kept.metrics = outputs["logits"], outputs["metrics"]
        if cache is not None:
            kept.keys = [layer.keys for layer in cache.layers]
            kept.cached_values = [layer.values for layer in cache.layers]
        return kept


def _readout_of(readout: Readout | None, rows: Ints) -> Readout | None:
    """The places of a readout, with their metrics, that lie in some consecutive rows, which count from 0 then."""
    if readout is None:
        return None
    inside = (readout["batch"] >= int(rows[0])) & (readout["batch"] <= int(rows[-1]))
    if not bool(inside.any()):
        return None
    metrics: list[MetricStep] = [
        {
            **metric,
            "tokens": None if metric["tokens"] is None else metric["tokens"][inside],
            "reference_row": None if metric["reference_row"] is None else metric["reference_row"][inside],
        }
        for metric in readout["metrics"]
    ]
    batch, column = readout["batch"][inside] - int(rows[0]), readout["column"][inside]
    return {**readout, "batch": batch, "column": column, "metrics": metrics}


def _joined(ids: torch.Tensor, lengths: torch.Tensor, parts: Sequence[Recording]) -> Recording:
    logits = [part.logits for part in parts if part.logits is not None]
    measured = [part.metrics for part in parts if part.metrics]
    return Recording(
        ids,
        lengths,
        {slot: torch.cat([part.values[slot] for part in parts]) for slot in parts[0].values},
        [torch.cat(layer) for layer in zip(*(part.keys for part in parts), strict=True)],
        [torch.cat(layer) for layer in zip(*(part.cached_values for part in parts), strict=True)],
        torch.cat(logits) if logits else None,
        [torch.cat(metric) for metric in zip(*measured, strict=True)],
    )
