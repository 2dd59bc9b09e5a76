"""A whole forward pass as a `Program`: prompts padded on the right, and a stop at each component that is read or written.

A causal model never lets a token see what follows it, so padding changes no value, and a token's position is its column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nsp.engine.program import LayerEntry, Program, Readout, Step, Visit
from nsp.engine.runtime import MODULE, Runtime
from nsp.errors import InputError
from nsp.sites import COMPONENTS


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
    if runtime.rotary_switch is not None:
        runtime.rotary_switch.check([len(prompt) for prompt in prompts])


def check_continuation(runtime: Runtime, longest: int, steps: int) -> None:
    """Refuse to continue a prompt of ``longest`` tokens by ``steps`` where the model's positions end before."""
    limit = runtime.longest_prompt
    if runtime.rotary_switch is not None:
        runtime.rotary_switch.check_continuation(longest, steps)
    if limit is not None and longest + steps > limit:
        raise InputError(f"a prompt of {longest} tokens cannot be continued by {steps}; the model reads at most {limit}")


def pad_token(runtime: Runtime) -> int:
    """The id that fills padding columns, which no real token ever sees."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(runtime.tokenizer, name, None)
        if isinstance(value, int) and 0 <= value < runtime.vocabulary:  # a token that was added may have no embedding
            return value
    return 0


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
    adds = component in COMPONENTS and COMPONENTS[component].adds
    multiplier = runtime.geometry.residual_multiplier if adds else 1.0
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
    path = table.final_norm if layer == runtime.geometry.n_layers else runtime.layer_paths[layer]
    return {
        "path": path, "layer": layer, "rows": rows, "join": None, "keys": None, "values": None,
        "writes": [], "reads": [], "visits": [], "trim": None,
    }  # fmt: skip


def whole_read() -> Step:
    """A read of a whole tensor."""
    return {"kind": "read", "batch": None, "column": None}


def program_of(
    runtime: Runtime,
    inputs: dict[str, Any],
    entries: Sequence[LayerEntry],
    readout: Readout | None,
    *,
    first: torch.Tensor | None = None,
) -> Program:
    """The program of the last layers and the final boundary; the layers before them are skipped and hand on ``first``."""
    start = entries[0]["layer"]
    return {
        "inputs": inputs,
        "batch": entries[-1]["rows"],
        "start": start,
        "skipped": runtime.layer_paths[:start],
        "first": first,
        "layers": list(entries[:-1]),
        "final": entries[-1],
        "readout": readout,
    }
