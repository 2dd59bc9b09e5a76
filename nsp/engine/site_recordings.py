"""One counterfactual: everything stated is applied together in one full forward pass, and anything in it can be
recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nsp.engine.branches import Ints
from nsp.engine.budget import Budget
from nsp.engine.lowering import Resolved, resolve
from nsp.engine.measured import Measured, Numbers
from nsp.engine.passes import lower_plain
from nsp.engine.planning import plan
from nsp.engine.program import Program
from nsp.engine.readout import logits_at
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.slots import Slot
from nsp.engine.trunk import run_bases
from nsp.sites import Site


@dataclass(frozen=True, eq=False)
class Recorded:
    """The value of a site in the counterfactual run.

    Attributes:
        resolved: the site on this model.
        values: float array with axes (base, layer, position, unit, width), NaN beyond a shorter prompt; for ``pattern``
            (base, layer, position, unit, key position); a whole component has one unit, or all its heads where it has
            heads.
    """

    resolved: Resolved
    values: np.ndarray


def record_counterfactuals(
    runtime: Runtime, request: Request, records: Sequence[Site], budget: Budget
) -> tuple[Measured, list[Recorded]]:
    """Run a request without swept axes, one counterfactual for each base, and record sites in the same passes."""
    branches = plan(runtime, replace(request, path="plain"))
    resolved = [resolve(runtime, site, request.bases) for site in records]
    slots = {(item.slot_component, layer) for item in resolved for layer in item.slot_layers}
    logits = {slot for slot in slots if slot[0] == "logits"}
    parts: list[list[np.ndarray]] = [[] for _ in records]
    with runtime.attention_for({*branches.components, *(site.component for site in records)}):
        trunk = run_bases(runtime, branches.bases, budget)
        numbers = Numbers(branches, trunk.values, trunk.reference)
        rows = budget.plain_rows(runtime, int(branches.bases.lengths.max()))
        chunks = [np.arange(low, min(low + rows, len(branches))) for low in range(0, len(branches), rows)]
        for chunk in chunks:
            lowered = lower_plain(runtime, branches, chunk, slots - logits)
            outputs = runtime.execute(lowered.program)
            values = lowered.values(outputs)
            if logits:
                values |= dict.fromkeys(logits, _all_logits(runtime, lowered.program))
            blocks = [_read_blocks(runtime, item, values, chunk) for item in resolved]
            here = iter(runtime.fetch([block for layers in blocks for rows in layers for block in rows]))
            numbers.add(lowered, outputs)
            for part, layers in zip(parts, blocks, strict=True):
                part.append(_padded([[next(here) for _ in rows] for rows in layers]))
    recorded = [Recorded(item, _joined(part)) for item, part in zip(resolved, parts, strict=True)]
    return numbers.measured(len(chunks)), recorded


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Chunks of prompts in one array; key positions and positions beyond a chunk's longest prompt are NaN."""
    size = np.max([part.shape[1:] for part in parts], axis=0)
    full = np.full((sum(len(part) for part in parts), *size), np.nan, dtype=np.float32)
    low = 0
    for part in parts:
        full[(slice(low, low + len(part)), *(slice(0, extent) for extent in part.shape[1:]))] = part
        low += len(part)
    return full


def _all_logits(runtime: Runtime, program: Program) -> torch.Tensor:
    """The logits of every token of a program, (row, position, token), in a run for themselves."""
    rows, columns = program["inputs"]["input_ids"].shape
    places = [(row, column) for row in range(rows) for column in range(columns)]
    logits = runtime.execute({**program, "readout": logits_at(runtime, places)})["logits"]
    assert logits is not None
    return logits.reshape(rows, columns, -1)


def _read_blocks(
    runtime: Runtime, item: Resolved, values: dict[Slot, torch.Tensor], chunk: Ints
) -> list[list[torch.Tensor]]:
    """The site's values by layer and prompt, each (position, unit, width), sliced where they were made."""
    chosen = [torch.as_tensor(item.positions[base], dtype=torch.long) for base in chunk]
    units = runtime.units(item.site.component)
    index = torch.as_tensor([units.index[unit] for unit in item.units] if item.units is not None else list(units.index))
    blocks = []
    for slot_layer in item.slot_layers:
        tensor = values[(item.slot_component, slot_layer)]
        if item.slot_component == "pattern":
            rows = [tensor[row][index][:, places].transpose(0, 1) for row, places in enumerate(chosen)]
        else:
            size = (units.rows, units.width)
            rows = [tensor[row, places].reshape(len(places), *size)[:, index] for row, places in enumerate(chosen)]
        blocks.append([row.float() for row in rows])
    return blocks


def _padded(blocks: Sequence[Sequence[torch.Tensor]]) -> np.ndarray:
    """Blocks by layer and prompt in one array: (prompt, layer, position, unit, width), NaN beyond a shorter prompt."""
    longest = max(len(block) for rows in blocks for block in rows)
    layers = []
    for rows in blocks:
        full = torch.full((len(rows), longest, *rows[0].shape[1:]), float("nan"))
        for row, block in enumerate(rows):
            full[row, : len(block)] = block.cpu()
        layers.append(full)
    return torch.stack(layers, dim=1).numpy()
