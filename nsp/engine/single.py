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
from nsp.engine.forward_pass import ordered_visits, visit_of, whole_read
from nsp.engine.lowering import Resolved, resolve
from nsp.engine.measured import Measured, Numbers
from nsp.engine.passes import Lowered, lower_plain
from nsp.engine.planning import plan
from nsp.engine.program import Outputs, Program, Readout, Visit
from nsp.engine.readout import build_readout
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot
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


def run_single(
    runtime: Runtime, request: Request, records: Sequence[Site], budget: Budget
) -> tuple[Measured, list[Recorded]]:
    """Run a request without swept axes, and record sites in the same pass."""
    branches = plan(runtime, replace(request, path="plain"))
    with runtime.attention_for([*branches.components, *(site.component for site in records)]):
        resolved = [resolve(runtime, site, request.bases) for site in records]
        trunk = run_bases(runtime, branches.bases, budget)
        numbers = Numbers(branches, trunk.values, trunk.reference)
        rows = budget.plain_rows(runtime, max(len(prompt) for prompt in request.bases))
        everything = np.arange(len(request.bases))
        parts: list[list[np.ndarray]] = [[] for _ in records]
        for chunk in (everything[low : low + rows] for low in range(0, len(everything), rows)):
            lowered = lower_plain(runtime, branches, chunk)
            outputs, values = _run(runtime, lowered, resolved, with_metrics=bool(branches.bases.measures))
            blocks = [_read_blocks(runtime, item, values, chunk) for item in resolved]
            here = iter(runtime.fetch([block for layers in blocks for rows in layers for block in rows]))
            numbers.add(lowered, outputs)
            for part, layers in zip(parts, blocks, strict=True):
                part.append(_padded([[next(here) for _ in rows] for rows in layers]))
    recorded = [Recorded(item, _joined(part)) for item, part in zip(resolved, parts, strict=True)]
    return numbers.measured(len(parts[0]) if parts else 1), recorded


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Chunks of prompts in one array; key positions and positions beyond a chunk's longest prompt are NaN."""
    size = np.max([part.shape[1:] for part in parts], axis=0)
    full = np.full((sum(len(part) for part in parts), *size), np.nan, dtype=np.float32)
    low = 0
    for part in parts:
        full[(slice(low, low + len(part)), *(slice(0, extent) for extent in part.shape[1:]))] = part
        low += len(part)
    return full


def _run(
    runtime: Runtime, lowered: Lowered, resolved: Sequence[Resolved], *, with_metrics: bool
) -> tuple[Outputs, dict[Slot, torch.Tensor]]:
    """Run the program of one counterfactual a prompt, reading every slot of ``resolved`` on the way."""
    program: Program = lowered.program
    slots = {(item.slot_component, layer) for item in resolved for layer in item.slot_layers}
    logits = {slot for slot in slots if slot[0] == "logits"}
    order: list[Slot | None] = []
    for entry in [*program["layers"], program["final"]]:
        layer = entry["layer"]
        order += [None] * len(entry["reads"])  # those of the metrics come first
        if (BOUNDARY, layer) in slots:
            entry["reads"].append(whole_read())
            order.append((BOUNDARY, layer))
        inside = [name for name, at in slots if at == layer and name not in (BOUNDARY, "logits")]
        written = {(visit["module"], visit["side"], visit["index"]): visit for visit in entry["visits"]}
        for name in inside:
            visit = visit_of(runtime, name, layer)
            written.setdefault((visit["module"], visit["side"], visit["index"]), visit)["reads"].append(whole_read())
        entry["visits"] = _in_order(runtime, layer, list(written.values()))
        order += _read_order(runtime, entry["visits"], inside, layer)
    if not with_metrics:
        program["readout"] = None
    outputs = runtime.execute(program)
    values = {slot: value for slot, value in zip(order, outputs["reads"], strict=True) if slot is not None}
    measured = [value for slot, value in zip(order, outputs["reads"], strict=True) if slot is None]
    if logits:
        whole: Program = {**program, "readout": _all_logits(runtime, program)}
        rows, columns = program["inputs"]["input_ids"].shape
        found = runtime.execute(whole)["logits"]
        assert found is not None
        values |= dict.fromkeys(logits, found.reshape(rows, columns, -1))
    return {**outputs, "reads": measured}, values


def _in_order(runtime: Runtime, layer: int, visits: list[Visit]) -> list[Visit]:
    components = [*runtime.geometry.table.components, "pattern"]
    places: dict[tuple[str, str, int | str | None], str] = {}
    for name in components:
        if name == "pattern" and not runtime.geometry.table.attention_call:
            continue
        visit = visit_of(runtime, name, layer)
        places.setdefault((visit["module"], visit["side"], visit["index"]), name)
    prefix = f"{runtime.geometry.table.layers}.{layer}."
    named = {}
    for visit in visits:
        key = (visit["module"], visit["side"], visit["index"])
        named[places.get(key, "module:" + prefix + str(visit["module"]).removeprefix(prefix))] = visit
    return [named[name] for name in ordered_visits(runtime, layer, named)]


def _read_order(runtime: Runtime, visits: list[Visit], names: Sequence[str], layer: int) -> list[Slot]:
    order: list[Slot] = []
    for visit in visits:
        for name in names:
            mine = visit_of(runtime, name, layer)
            if (mine["module"], mine["side"], mine["index"]) == (visit["module"], visit["side"], visit["index"]):
                order.append((name, layer))
    return order


def _all_logits(runtime: Runtime, program: Program) -> Readout:
    rows, columns = program["inputs"]["input_ids"].shape
    batch = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return build_readout(runtime, [], torch.zeros(len(batch), dtype=torch.long), [batch], [column], logits=True)


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
