"""Ordinary runs, kept: what every layer receives, keys and values, activations at wanted sites, and measured metrics.

Prompts of several lengths run together, padded on the right: a causal model never lets a token see what follows it, so
padding changes no value, and a token's position is its column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from nsp.engine.program import LayerEntry, Program, Readout, Step, Visit
from nsp.engine.runtime import MODULE, Runtime
from nsp.errors import InputError

BOUNDARY = "boundary"
Slot = tuple[
    str, int
]  # (component, layer); ("boundary", l) is what layer l receives, ("boundary", n_layers) the final residual


def slot_of(component: str, layer: int, n_layers: int) -> Slot:
    """Where a component's value is kept: the three names of the residual stream between layers share one slot."""
    if component == "embed":
        return (BOUNDARY, 0)
    if component == "resid_pre":
        return (BOUNDARY, layer)
    if component == "resid_post":
        return (BOUNDARY, layer + 1)
    return (component, layer)


@dataclass
class Capture:
    """What one batched ordinary run left behind.

    Attributes:
        ids: token ids with axes (prompt, position), right-padded; ``lengths`` the true lengths.
        values: slot -> tensor with axes (prompt, position, width); ``pattern`` slots (prompt, head, position, key
            position).
        keys, cached_values: per layer (prompt, head, position, width), where they were asked for.
        logits: (readout, token) float32, where asked for.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    values: dict[Slot, torch.Tensor] = field(default_factory=dict)
    keys: list[torch.Tensor] = field(default_factory=list)
    cached_values: list[torch.Tensor] = field(default_factory=list)
    logits: torch.Tensor | None = None

    def only(self, rows: npt.NDArray[np.int64]) -> Capture:
        """The given prompts' rows, in that order; the capture itself where that is all of them."""
        if len(rows) == len(self.ids) and (rows == np.arange(len(rows))).all():
            return self
        at: torch.Tensor | slice = torch.as_tensor(rows, device=self.ids.device)
        if len(rows) == 1:
            at = slice(int(rows[0]), int(rows[0]) + 1)  # a view
        kept = Capture(self.ids[at], self.lengths[at.cpu() if isinstance(at, torch.Tensor) else at])
        # Branches read the residual stream between layers, and keys and values; donors' sites stay where they are.
        kept.values = {slot: value[at] for slot, value in self.values.items() if slot[0] == BOUNDARY}
        kept.keys = [value[at] for value in self.keys]
        kept.cached_values = [value[at] for value in self.cached_values]
        return kept

    @property
    def bytes(self) -> int:
        """Memory the capture holds."""
        tensors = [*self.values.values(), *self.keys, *self.cached_values]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_ids(runtime: Runtime, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse token ids that the model has no embedding for, and prompts longer than it can read."""
    size, limit = runtime.vocabulary, runtime.longest_prompt
    for prompt in prompts:
        worst = max(prompt)
        if worst >= size or min(prompt) < 0:
            raise InputError(
                f"token id {worst if worst >= size else min(prompt)} is not in the model's vocabulary (0 to {size - 1})"
            )
        if limit is not None and len(prompt) > limit:
            raise InputError(f"a prompt has {len(prompt)} tokens; the model reads at most {limit}")


def padded_ids(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (prompt, position) padded on the right, and the true lengths."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), int(lengths.max())), pad, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt))
    return ids.to(device), lengths


def plain_inputs(runtime: Runtime, ids: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
    """The model inputs of an ordinary forward pass over right-padded rows."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    mask = (columns[None, :] < lengths.to(ids.device)[:, None]).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": columns[None, :].expand(ids.shape[0], -1),
        "use_cache": False,
    }


def visit_of(runtime: Runtime, component: str, layer: int) -> Visit:
    """An empty stop at a component of one layer."""
    table = runtime.geometry.table
    base = f"{table.layers}.{layer}"
    if component == "pattern":
        module, side, index = f"{base}.{table.attention}", "pattern", table.attention_call
        return {"module": module, "side": side, "index": index, "reused": False, "multiplier": 1.0,
                "width": runtime.read_width(component), "writes": [], "reads": [], "bypass": ""}  # fmt: skip
    where = runtime.locate(component)
    multiplier = runtime.geometry.residual_multiplier if component in {"attn_out", "mlp_out"} else 1.0
    return {
        "module": f"{base}.{where.module}" if where.module else base,
        "side": where.side,
        "index": where.call or where.index,
        "reused": where.reused,
        "multiplier": multiplier,
        "width": runtime.read_width(component),
        "writes": [],
        "reads": [],
        "bypass": "",
    }


def ordered_visits(runtime: Runtime, layer: int, components: Iterable[str]) -> list[str]:
    """Components in the order in which the layer makes them."""
    names = list(dict.fromkeys(components))
    ordered = any(name.startswith(MODULE) for name in names)
    return sorted(names, key=lambda name: runtime.rank(name, layer, ordered))


def empty_entry(runtime: Runtime, layer: int, rows: int) -> LayerEntry:
    """A layer (or, at ``layer == n_layers``, the final boundary) in which nothing happens yet."""
    table = runtime.geometry.table
    path = table.final_norm if layer == runtime.geometry.n_layers else f"{table.layers}.{layer}"
    return {
        "path": path, "layer": layer, "rows": rows, "join": None, "keys": None, "values": None,
        "writes": [], "reads": [], "visits": [], "trim": None,
    }  # fmt: skip


def whole_read() -> Step:
    """A read of a whole tensor."""
    return {"kind": "read", "batch": None, "column": None}


def capture(
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    slots: Iterable[Slot],
    *,
    keep_cache: bool = False,
    readout: Readout | None = None,
    max_tokens: int = 8192,
    stay: bool = False,
) -> Capture:
    """Run ``prompts`` once, in batches of at most ``max_tokens`` columns, and keep the asked-for slots (and keys and
    values).

    ``readout`` names rows of ``prompts``; its rows must ascend. Where the model is on a server, the slots come here
    unless they ``stay`` there for programs that read them; keys and values always stay.
    """
    check_ids(runtime, prompts)
    ids, lengths = padded_ids(prompts, pad_token(runtime), runtime.device)
    slots = set(slots)
    if not slots and not keep_cache and readout is None:
        return Capture(ids, lengths)  # nothing is asked of the run
    each = max(1, max_tokens // ids.shape[1])
    parts = [
        _capture_batch(
            runtime, ids[low : low + each], lengths[low : low + each], slots, keep_cache, _part(readout, low, each)
        )
        for low in range(0, len(ids), each)
    ]
    if not stay:
        for part in parts:
            part.values = dict(zip(part.values, runtime.fetch(list(part.values.values())), strict=True))
    if len(parts) == 1:
        return parts[0]
    joined = Capture(ids, lengths, {slot: torch.cat([part.values[slot] for part in parts]) for slot in parts[0].values})
    joined.keys = [torch.cat(layer) for layer in zip(*(part.keys for part in parts), strict=True)]
    joined.cached_values = [torch.cat(layer) for layer in zip(*(part.cached_values for part in parts), strict=True)]
    logits = [part.logits for part in parts if part.logits is not None]
    joined.logits = torch.cat(logits) if logits else None
    return joined


def _part(readout: Readout | None, low: int, count: int) -> Readout | None:
    if readout is None:
        return None
    inside = (readout["batch"] >= low) & (readout["batch"] < low + count)
    if not bool(inside.any()):
        return None
    return {**readout, "batch": readout["batch"][inside] - low, "column": readout["column"][inside]}


def _capture_batch(
    runtime: Runtime,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    slots: set[Slot],
    keep_cache: bool,
    readout: Readout | None,
) -> Capture:
    program, order = capture_program(runtime, ids, lengths, slots, readout)
    return run_capture(runtime, program, order, ids, lengths, keep_cache=keep_cache)


def run_capture(
    runtime: Runtime,
    program: Program,
    order: Sequence[Slot],
    ids: torch.Tensor,
    lengths: torch.Tensor,
    *,
    keep_cache: bool,
) -> Capture:
    """Run a program of `capture_program` and keep what it reads, its logits, and (``keep_cache``) keys and values."""
    cache = DynamicCache() if keep_cache else None
    if cache is not None:
        program["inputs"] |= {"past_key_values": cache, "use_cache": True}
    outputs = runtime.execute(program)
    kept = Capture(ids, lengths, dict(zip(order, outputs["reads"], strict=True)))
    kept.logits = outputs["logits"]
    if cache is not None:
        kept.keys = [layer.keys for layer in cache.layers]
        kept.cached_values = [layer.values for layer in cache.layers]
    return kept


def capture_program(
    runtime: Runtime, ids: torch.Tensor, lengths: torch.Tensor, slots: set[Slot], readout: Readout | None
) -> tuple[Program, list[Slot]]:
    """The program of an ordinary run that reads ``slots``, and the order in which it returns them."""
    n_layers, rows = runtime.geometry.n_layers, ids.shape[0]
    order: list[Slot] = []
    layers: list[LayerEntry] = []
    for layer in range(n_layers):
        entry = empty_entry(runtime, layer, rows)
        if (BOUNDARY, layer) in slots:
            entry["reads"].append(whole_read())
            order.append((BOUNDARY, layer))
        inside = [component for component, at in slots if at == layer and component != BOUNDARY]
        for component in ordered_visits(runtime, layer, inside):
            visit = visit_of(runtime, component, layer)
            visit["reads"].append(whole_read())
            entry["visits"].append(visit)
            order.append((component, layer))
        layers.append(entry)
    final = empty_entry(runtime, n_layers, rows)
    if (BOUNDARY, n_layers) in slots:
        final["reads"].append(whole_read())
        order.append((BOUNDARY, n_layers))
    program: Program = {
        "inputs": plain_inputs(runtime, ids, lengths),
        "batch": rows,
        "start": 0,
        "skipped": [],
        "first": None,
        "layers": layers,
        "final": final,
        "readout": readout,
    }
    return program, order


def pad_token(runtime: Runtime) -> int:
    """The id that fills padding columns, which no real token ever sees."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(runtime.tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0
