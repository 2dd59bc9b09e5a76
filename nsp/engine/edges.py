"""Edge attribution patching (EAP): what each head and MLP sends straight to each later one, for all pairs at once.

The score of an edge is (donor - base) of what the sender adds to the residual stream, times the metric's gradient at what the
receiver reads (Syed et al. 2023; Hanna et al. 2024). One forward and one backward pass; then each receiver's gradient is carried
back to the stream that it reads, and from there to every sender before it. The edges of a sender sum to its own attribution, by
the chain rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nsp.engine.forward_pass import pad_token, padded_ids
from nsp.engine.gradients import GradientProgram, Objective, gradient_program, residual_factor, run_gradients
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot
from nsp.errors import InputError
from nsp.sites import COMPONENTS, IN_LAYER

_NEEDED = tuple(name for name in IN_LAYER if COMPONENTS[name].sends or COMPONENTS[name].receives)
_READERS = tuple(name for name in _NEEDED if COMPONENTS[name].has_heads and COMPONENTS[name].receives)


def check_edges(runtime: Runtime) -> None:
    """InputError where the model's residual stream is not the sum of what heads and MLPs add."""
    geometry = runtime.geometry
    if geometry.table.stream:
        raise InputError(
            f"edges need a residual stream that is a sum; in {geometry.table.name} {geometry.table.stream}"
        )
    for component in _NEEDED:
        if component not in geometry.components() or len(geometry.layers_of(component)) < geometry.n_layers:
            raise InputError(f"edges need {component} in every layer, which {geometry.table.name} does not have")


def sender_slots(runtime: Runtime) -> list[Slot]:
    """The slots whose donor values edges need: the embedding, every layer's heads and MLP."""
    layers = range(runtime.geometry.n_layers)
    return [(BOUNDARY, 0), *(slot for layer in layers for slot in (("z", layer), ("mlp_out", layer)))]


def sender_names(runtime: Runtime) -> list[str]:
    """The senders: ``embed``, then each layer's heads ``z[layer][head]`` and its ``mlp_out[layer]``."""
    geometry = runtime.geometry
    names = ["embed"]
    for layer in range(geometry.n_layers):
        names += [f"z[{layer}][{head}]" for head in range(geometry.n_heads)] + [f"mlp_out[{layer}]"]
    return names


def receiver_names(runtime: Runtime) -> list[str]:
    """The receivers: each layer's queries, keys and values by head, its MLP, and at last the ``logits``."""
    geometry = runtime.geometry
    names = []
    for layer in range(geometry.n_layers):
        for component in _READERS:
            names += [f"{component}[{layer}][{head}]" for head in range(geometry.unit_count(component))]
        names.append(f"mlp_out[{layer}]")
    return [*names, "logits"]


def edge_attribution(
    runtime: Runtime, prompt: Sequence[int], objective: Objective, donors: Mapping[Slot, torch.Tensor]
) -> np.ndarray:
    """Edge scores of one prompt, (sender, receiver), NaN where the receiver does not come after the sender.

    ``donors`` holds the donor's value at every slot of `sender_slots`, (1, position, width), NaN-free; the score sums over positions.
    """
    check_edges(runtime)
    geometry = runtime.geometry
    n_layers, sequential = geometry.n_layers, not geometry.table.parallel
    slots = [(BOUNDARY, layer) for layer in range(n_layers + 1)]
    slots += [(component, layer) for layer in range(n_layers) for component in _NEEDED]
    if sequential:
        slots += [("resid_mid", layer) for layer in range(n_layers)]
    ids, lengths = padded_ids([prompt], pad_token(runtime), runtime.device)
    program, numbers = gradient_program(runtime, ids, lengths, slots, objective)
    base = run_gradients(runtime, program, numbers)["values"]
    differences = {
        slot: donors[slot] - base[numbers[slot]].cpu() * residual_factor(runtime, slot[0])
        for slot in sender_slots(runtime)
    }
    # Another program: on a server the first one has not run yet.
    with_edges: GradientProgram = {
        **program,
        "edges": {
            "senders": len(sender_names(runtime)),
            "receivers": _receivers(runtime, numbers),
            "sending": _sending(runtime, numbers, differences),
        },
    }
    return np.asarray(run_gradients(runtime, with_edges, numbers)["edges"].numpy())


def _receivers(runtime: Runtime, numbers: Mapping[Slot, int]) -> list[dict[str, Any]]:
    geometry = runtime.geometry
    found: list[dict[str, Any]] = []
    for layer in range(geometry.n_layers):
        for component in _READERS:
            units = runtime.units(component)
            found.append(
                {
                    "of": numbers[component, layer],
                    "stream": numbers[BOUNDARY, layer],
                    "rows": list(units.index),
                    "split": units.rows,
                }
            )
        stream = (BOUNDARY, layer) if geometry.table.parallel else ("resid_mid", layer)
        found.append({"of": numbers["mlp_out", layer], "stream": numbers[stream], "rows": None, "split": 1})
    final = numbers[BOUNDARY, geometry.n_layers]
    return [*found, {"of": final, "stream": final, "rows": None, "split": 1}]


def _sending(
    runtime: Runtime, numbers: Mapping[Slot, int], differences: Mapping[Slot, torch.Tensor]
) -> list[dict[str, Any]]:
    geometry = runtime.geometry
    heads = geometry.n_heads
    # Receivers in order: where each layer's attention and MLP stand.
    attention: list[list[int]] = []
    mlps: list[int] = []
    at = 0
    for _ in range(geometry.n_layers):
        count = sum(geometry.unit_count(component) for component in _READERS)
        attention.append(list(range(at, at + count)))
        mlps.append(at + count)
        at += count + 1
    logits = at

    def after(layer: int, *, own_mlp: bool) -> list[int]:
        later = [number for other in range(layer + 1, geometry.n_layers) for number in (*attention[other], mlps[other])]
        return [*([mlps[layer]] if own_mlp else []), *later, logits]

    whole = {"split": 1, "rows": [0], "multiplier": 1.0}
    start = numbers[BOUNDARY, 0]
    sending: list[dict[str, Any]] = [
        {
            "of": start,
            "into": start,
            "difference": differences[BOUNDARY, 0],
            "numbers": [0],
            "reaches": list(range(logits + 1)),
            **whole,
        }
    ]
    units = runtime.units("z")
    for layer in range(geometry.n_layers):
        first = 1 + layer * (heads + 1)
        sending.append({
            "of": numbers["z", layer], "into": numbers["attn_out", layer], "difference": differences["z", layer],
            "multiplier": residual_factor(runtime, "attn_out"), "split": units.rows, "rows": list(units.index),
            "numbers": list(range(first, first + heads)), "reaches": after(layer, own_mlp=not geometry.table.parallel),
        })  # fmt: skip
        mlp = numbers["mlp_out", layer]
        sending.append({
            "of": mlp, "into": mlp, "difference": differences["mlp_out", layer], "numbers": [first + heads],
            "reaches": after(layer, own_mlp=False), **whole,
        })  # fmt: skip
    return sending
