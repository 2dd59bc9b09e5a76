"""What one layer makes of states put into it, token by token.

The norms, the query, key and value projections, the attention's output projection and the MLP read one token each, so
states of many counterfactuals run side by side as the tokens of one pass, whatever they belong to. The model's own
modules compute them: post-norms, multipliers, biases and fused projections are what they are in a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nsp.engine.budget import Budget
from nsp.engine.forward_pass import empty_entry, ordered_visits, plain_inputs, program_of, visit_of, whole_read
from nsp.engine.program import LayerEntry, Step
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY

# Columns of a row: attention among tokens that have nothing to do with each other is wasted, so rows are short.
_WIDTH = 16


def through_layer(
    runtime: Runtime, layer: int, component: str, states: torch.Tensor, reads: Sequence[str], budget: Budget
) -> dict[str, torch.Tensor]:
    """Put states (token, width) in the place of a component of one layer; return the components that it makes of them.

    Args:
        component: what the states are: ``boundary`` (what the layer receives), ``z``, ``resid_mid``.
        reads: components that read one token each and come after: ``q``, ``k`` and ``v``, ``attn_out``, ``mlp_out``.

    Returns component -> (token, width), in float32, of the whole tensor that the component lies in.
    """
    rows = budget.plain_rows(runtime, _WIDTH)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in reads}
    for low in range(0, len(states), rows * _WIDTH):
        part = states[low : low + rows * _WIDTH]
        values = _run(runtime, layer, component, part, reads)
        for name, value in zip(found, values, strict=True):
            found[name].append(value.reshape(-1, value.shape[-1])[: len(part)].float())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _run(
    runtime: Runtime, layer: int, component: str, states: torch.Tensor, reads: Sequence[str]
) -> list[torch.Tensor]:
    geometry, device = runtime.geometry, runtime.device
    width = min(_WIDTH, len(states))
    count = -(-len(states) // width)
    # The last row is filled with the last state, so that nothing divides by zero.
    filler = states[-1:].expand(count * width - len(states), -1)
    filled = torch.cat([states, filler]).to(device=device, dtype=runtime.dtype)
    skipped = 0 if runtime.branch_refusal else layer
    layers: list[LayerEntry] = [empty_entry(runtime, number, count) for number in range(skipped, geometry.n_layers)]
    here = layers[layer - skipped]
    step: Step = {
        "kind": "set",
        "batch": torch.arange(count, device=device).repeat_interleave(width),
        "column": torch.arange(width, device=device).repeat(count),
        "unit": torch.zeros(count * width, dtype=torch.long, device=device),
        "rows": 1,
        "operand": filled,
    }
    if component == BOUNDARY:
        here["writes"].append(step)
    first = filled.new_zeros(count, width, geometry.d_model) if skipped else None
    layers[0]["join"] = first  # so that the layer takes it whatever the skipped ones hand on
    order = _visits(runtime, here, component, step, reads)
    for entry in layers[layer - skipped + 1 :]:
        _leave_out(runtime, entry)
    ids = torch.zeros(count, width, dtype=torch.long, device=device)
    final = empty_entry(runtime, geometry.n_layers, count)
    inputs = plain_inputs(runtime, ids, torch.full((count,), width))
    program = program_of(runtime, inputs, [*layers, final], None, first=first)
    values = dict(zip(order, runtime.fetch(runtime.execute(program)["reads"]), strict=True))
    return [values[name] for name in reads]


def _visits(runtime: Runtime, entry: LayerEntry, component: str, step: Step, reads: Sequence[str]) -> list[str]:
    """Put the write and the reads into the layer; returns the components read, in the order in which they come."""
    layer = entry["layer"]
    names = [*reads, *([component] if component != BOUNDARY else [])]
    if component == "resid_mid":
        names.append("mlp_out")
    order = []
    for name in ordered_visits(runtime, layer, names):
        visit = visit_of(runtime, name, layer)
        if name == component:
            visit["writes"].append(step)
        if name in reads:
            visit["reads"].append(whole_read())
            order.append(name)
        if component == "resid_mid" and name in ("resid_mid", "mlp_out"):
            # The MLP reads the new stream, the sum around it keeps the old one (see `nsp.engine.execute`).
            visit["bypass"] = "leaves" if name == "resid_mid" else "arrives"
        entry["visits"].append(visit)
    return order


def _leave_out(runtime: Runtime, entry: LayerEntry) -> None:
    """Run a later layer's MLP on one token alone: nothing of it is read."""
    table = runtime.geometry.table
    if table.mlp and entry["layer"] in runtime.geometry.layers_of("mlp_out"):
        one = torch.zeros(1, dtype=torch.long, device=runtime.device)
        entry["trim"] = {"module": f"{table.layers}.{entry['layer']}.{table.mlp}", "batch": one, "column": one}
