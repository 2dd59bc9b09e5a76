"""Gradients of a metric at many sites at once: one forward and one backward pass for a batch of prompts.

Prompts of several lengths run together, right-padded: a padding column's gradient is zero. With `propagation_rules` the
backward pass is linear where they say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from nsp.engine.forward_pass import pad_token, padded_ids, plain_inputs
from nsp.engine.propagation_rule_kernels import RULE
from nsp.engine.propagation_rules import (
    Rules,
    check_rules,
    experts_path,
    is_norm,
    norm_paths,
    products,
    shared_gate_path,
)
from nsp.engine.recording import Prompts, token_ids
from nsp.engine.runtime import MODULE, Runtime
from nsp.engine.slots import BOUNDARY, Slot
from nsp.errors import InputError
from nsp.metrics import METRICS
from nsp.models.geometry import submodule
from nsp.sites import COMPONENTS

DIFFERENTIABLE = ("logit_diff", "logit", "logprob", "prob")


class GradientStop(TypedDict):
    """One place of the forward pass and what is done with its tensor, in this order."""

    module: str
    side: str  # layer (what it receives) | input | output | call | experts | pattern
    index: Any  # element of a tuple output, or a call's name
    linear: bool  # experts alone: with the product rule
    actions: list[dict[str, Any]]  # do: leaf, set, alias, keep, norm, product, track, detach


class GradientProgram(TypedDict):
    """A forward and backward pass as plain data."""

    inputs: dict[str, Any]
    rows: int
    skipped: list[str]  # layers that do not run, by path
    first: torch.Tensor | None  # what they would hand on, (row, position, width)
    stops: list[GradientStop]
    final: dict[str, Any]  # the final norm: module, number (tracked, or None), linear, settings
    readout: dict[str, Any]
    edges: dict[str, Any] | None


@dataclass(frozen=True)
class Objective:
    """What is differentiated: a metric kind, its token ids (row, 1 or 2), and the position of each row."""

    kind: str
    tokens: torch.Tensor
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in DIFFERENTIABLE:
            raise InputError(f"{self.kind} has no gradient here; attribution takes {', '.join(DIFFERENTIABLE)}")

    def rows(self, chosen: Sequence[int]) -> Objective:
        """The objective of some rows, in that order."""
        return Objective(self.kind, self.tokens[list(chosen)], tuple(self.positions[row] for row in chosen))


@dataclass(frozen=True, eq=False)
class Setting:
    """A slot's tensor replaced in the forward pass: where ``mask`` (row, position, 1), by ``value`` (row, position, width).

    Not at ``resid_mid`` (the sum around the MLP would keep the old value) nor at ``pattern``.
    """

    slot: Slot
    mask: torch.Tensor
    value: torch.Tensor

    def __post_init__(self) -> None:
        if self.slot[0] in ("resid_mid", "pattern"):
            raise InputError(
                f"{self.slot[0]} cannot be interpolated in a gradient pass; take eap_ig, or atp_ig at attn_out, resid_pre or z"
            )


    def rows(self, chosen: Sequence[int]) -> Setting:
        """The setting of some rows, in that order."""
        return Setting(self.slot, self.mask[list(chosen)], self.value[list(chosen)])


@dataclass(eq=False)
class Gradients:
    """Values and gradients by slot, on the CPU, and the metric (row,).

    Both have axes (row, position, width), for ``pattern`` (row, head, position, key position). Values of ``attn_out`` and ``mlp_out``
    are what is added to the residual stream, as everywhere in nsp.
    """

    lengths: torch.Tensor
    metric: torch.Tensor
    values: dict[Slot, torch.Tensor] = field(default_factory=dict)
    gradients: dict[Slot, torch.Tensor] = field(default_factory=dict)


def gradients(
    runtime: Runtime,
    prompts: Prompts,
    slots: Collection[Slot],
    objective: Objective,
    *,
    rules: Rules | None = None,
    settings: Sequence[Setting] = (),
    received: torch.Tensor | None = None,
    max_tokens: int = 2048,
) -> Gradients:
    """Values and gradients of ``objective`` at ``slots``, in batches of at most ``max_tokens`` columns.

    Args:
        rules: the propagation rules that the backward pass follows; None: the model's own derivatives.
        settings: slots whose tensors are replaced in the forward pass.
        received: what the first layer of ``slots`` receives in an ordinary run, (row, position, width): the layers before it then
            need not run (where the branch path is right for the model; elsewhere it is not used).

    Raises:
        InputError: token ids that the model lacks; a part of the model that the rules do not cover, or do not fit.
    """
    tokens = token_ids(runtime, prompts)
    if rules is not None:
        check_rules(runtime)
    wanted = sorted(set(slots), key=lambda slot: (slot[1], slot[0]))
    ids, lengths = padded_ids(tokens, pad_token(runtime), runtime.device)
    size = max(1, max_tokens // ids.shape[1])
    if runtime.branch_refusal:
        received = None
    parts: list[Gradients] = []
    with runtime.attention_for(component for component, _ in wanted):
        for low in range(0, len(ids), size):
            batch = slice(low, low + size)
            rows = range(len(ids))[batch]
            program, numbers = gradient_program(
                runtime, ids[batch], lengths[batch], wanted, objective.rows(rows), [setting.rows(rows) for setting in settings],
                rules=rules, received=None if received is None else received[batch],
            )  # fmt: skip
            parts.append(_of_outputs(runtime, lengths[batch], numbers, run_gradients(runtime, program, numbers)))
    if len(parts) == 1:
        return parts[0]
    return Gradients(
        lengths,
        torch.cat([part.metric for part in parts]),
        {slot: torch.cat([part.values[slot] for part in parts]) for slot in wanted},
        {slot: torch.cat([part.gradients[slot] for part in parts]) for slot in wanted},
    )


def run_gradients(runtime: Runtime, program: GradientProgram, slots: Mapping[Slot, int]) -> dict[str, Any]:
    """Run one gradient program where the weights are; ``slots`` are the numbers that `gradient_program` gave."""
    try:
        return runtime.differentiate(program, slots)
    except Exception as error:
        # nnsight wraps what is raised inside a trace in a class that it makes.
        said = [line for line in str(error).splitlines() if RULE in line]
        if said:
            raise InputError(said[-1][said[-1].index(RULE) :]) from None
        raise


def _of_outputs(
    runtime: Runtime, lengths: torch.Tensor, numbers: Mapping[Slot, int], outputs: Mapping[str, Any]
) -> Gradients:
    kept = Gradients(lengths, outputs["metric"].float().cpu())
    for slot, number in numbers.items():
        factor = residual_factor(runtime, slot[0])
        kept.values[slot] = _wide(outputs["values"][number]) * factor
        kept.gradients[slot] = _wide(outputs["gradients"][number]) / factor
    return kept


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, at least in float32."""
    return tensor.cpu() if tensor.dtype == torch.float64 else tensor.float().cpu()


def residual_factor(runtime: Runtime, component: str) -> float:
    """What a component's tensor is multiplied by before it is added to the residual stream."""
    known = COMPONENTS.get(component)
    return runtime.geometry.residual_multiplier if known is not None and known.adds else 1.0


class _Stops:
    """The stops of one layer, found by module and side, kept with their place in the order of execution."""

    def __init__(self, runtime: Runtime, layer: int) -> None:
        self.runtime, self.layer = runtime, layer
        self.base = f"{runtime.geometry.table.layers}.{layer}"
        self.stops: dict[tuple[str, str, Any], tuple[float, GradientStop]] = {}

    def at(self, component: str) -> list[dict[str, Any]]:
        """The actions at a component (``module:`` paths included), or at what the layer receives."""
        if component == BOUNDARY:
            return self._actions((self.base, "layer", None), -1.0)
        table = self.runtime.geometry.table
        if component == "pattern":
            place: tuple[str, str, Any] = (f"{self.base}.{table.attention}", "pattern", table.attention_call)
        else:
            where = self.runtime.locate(component)
            place = (f"{self.base}.{where.module}".rstrip("."), where.side, where.call or where.index)
        return self._actions(place, self.runtime.rank(component, self.layer, True))

    def input_of(self, component: str) -> list[dict[str, Any]]:
        """The actions at the input of a ``module:`` path without submodules."""
        path = component.removeprefix(MODULE)
        return self._actions((path, "input", None), self.runtime.rank(component, self.layer, True) - 0.5)

    def _actions(self, place: tuple[str, str, Any], rank: float) -> list[dict[str, Any]]:
        module, side, index = place
        stop: GradientStop = {"module": module, "side": side, "index": index, "linear": False, "actions": []}
        return self.stops.setdefault(place, (rank, stop))[1]["actions"]

    def ordered(self) -> list[GradientStop]:
        """The stops in the order of execution, each with its actions in theirs."""
        stops = [stop for _, stop in sorted(self.stops.values(), key=lambda ranked: ranked[0])]
        for stop in stops:
            stop["actions"].sort(key=lambda action: _ORDER.index(action["do"]))
        return stops


_ORDER = ("leaf", "norm", "product", "set", "keep", "track", "alias", "detach")


def gradient_program(
    runtime: Runtime,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    slots: Sequence[Slot],
    objective: Objective,
    settings: Sequence[Setting] = (),
    *,
    rules: Rules | None = None,
    received: torch.Tensor | None = None,
    logits: bool = False,
) -> tuple[GradientProgram, dict[Slot, int]]:
    """The program of one batch, and the number under which each slot's tensor is tracked."""
    n_layers, table = runtime.geometry.n_layers, runtime.geometry.table
    stops: list[GradientStop] = []
    numbers: dict[Slot, int] = {}
    tracked = 0  # tensors that several components share are tracked once
    # Where nothing before it is asked for, the graph begins at the first layer that is.
    first = min((layer for _, layer in slots), default=n_layers)
    first = max(0, min(first, n_layers - 1))
    for layer in range(n_layers):
        at_layer = _Stops(runtime, layer)
        if layer == first:
            at_layer.at(BOUNDARY).append({"do": "leaf"})
        for setting in settings:
            if setting.slot[1] == layer:
                at_layer.at(setting.slot[0]).append(_set_action(setting, residual_factor(runtime, setting.slot[0])))
        for component in sorted(component for component, at in slots if at == layer):
            actions = at_layer.at(component)
            track = next((action for action in actions if action["do"] == "track"), None)
            if track is None:
                track = {"do": "track", "number": tracked}
                tracked += 1
                actions.append(track)
                if component not in ("pattern", BOUNDARY) and runtime.locate(component).reused:
                    actions.append({"do": "alias"})
            numbers[component, layer] = track["number"]
        if rules is not None and layer >= first:
            _add_rules(runtime, at_layer, rules)
        stops += at_layer.ordered()
    if (BOUNDARY, n_layers) in slots:
        numbers[BOUNDARY, n_layers] = tracked
    final = {
        "module": table.final_norm,
        "number": numbers.get((BOUNDARY, n_layers)),
        "linear": rules is not None and is_norm(submodule(runtime.module, table.final_norm)),
        "settings": [_set_action(setting) for setting in settings if setting.slot == (BOUNDARY, n_layers)],
    }
    program: GradientProgram = {
        "inputs": plain_inputs(runtime, ids, lengths),
        "rows": len(ids),
        "skipped": [] if received is None else [f"{table.layers}.{layer}" for layer in range(first)],
        "first": None if received is None else received.to(runtime.device),
        "stops": stops,
        "final": final,
        "readout": _readout(runtime, objective, rules is not None, logits),
        "edges": None,
    }
    return program, numbers


def _set_action(setting: Setting, factor: float = 1.0) -> dict[str, Any]:
    return {"do": "set", "mask": setting.mask, "value": setting.value / factor}


def _add_rules(runtime: Runtime, stops: _Stops, rules: Rules) -> None:
    """The rules' substitutions in one layer."""
    layer, base = stops.layer, stops.base
    for path in norm_paths(runtime, layer):
        name = f"{MODULE}{base}.{path}"
        stops.input_of(name).append({"do": "keep", "name": path, "rows": None})
        stops.at(name).append({"do": "norm", "of": path})
    for product in products(runtime, layer):
        for factor in product.factors:
            stops.at(factor).append({"do": "keep", "name": factor, **_rows_kept(runtime, factor)})
        into = stops.at(product.neurons) if not product.neurons.startswith(MODULE) else stops.input_of(product.neurons)
        into.append({"do": "product", "of": list(product.factors)})
    if experts_path(runtime, layer) is not None:
        stops.at("mlp_neurons")
        for _, stop in stops.stops.values():
            stop["linear"] = stop["linear"] or stop["side"] == "experts"
    gate = shared_gate_path(runtime, layer)
    if gate is not None:
        stops.at(f"{MODULE}{base}.{gate}").append({"do": "detach", "split": 1, "mask": torch.ones(1, dtype=torch.bool)})
    if rules.attention == "frozen" and "q" in runtime.geometry.table.components:
        for component in ("q", "k"):
            if layer in runtime.geometry.layers_of(component):
                units = runtime.units(component)
                mask = torch.zeros(units.rows, dtype=torch.bool)
                mask[list(units.index)] = True
                stops.at(component).append({"do": "detach", "split": units.rows, "mask": mask})


def _rows_kept(runtime: Runtime, factor: str) -> dict[str, Any]:
    if factor.startswith(MODULE):
        return {"rows": None}
    units = runtime.units(factor)
    if units.count == units.rows:
        return {"rows": None}
    return {"rows": list(units.index), "split": units.rows}


def _readout(runtime: Runtime, objective: Objective, linear: bool, logits: bool) -> dict[str, Any]:
    geometry, device = runtime.geometry, runtime.device
    tokens = objective.tokens.to(device)
    vocabulary = None
    if METRICS[objective.kind].needs == "tokens" and not logits:
        vocabulary, tokens = torch.unique(tokens, return_inverse=True)
    return {
        "head": geometry.table.head,
        "batch": torch.arange(len(objective.positions), device=device),
        "column": torch.tensor(objective.positions, device=device),
        "vocabulary": vocabulary,
        "tokens": tokens,
        "kind": objective.kind,
        "logits": logits,
        "linear": linear,
        "softcap": geometry.softcap,
        "logit_scale": geometry.logit_scale,
    }
