"""Propagation rules of gradient passes (LRP, RelP): which parts of a backward pass are made linear.

A rule never touches the model: a gradient pass carries straight-through substitutions (`propagation_rule_kernels`), so the
forward pass keeps every bit and nothing is left behind, whatever is raised. The rules are

- norms: the scale of each token is detached, whatever the norm (RMS, with an offset, layer norm with its mean);
- activation function: its coefficient f(x) / x is detached, whatever the function;
- gate times up: half of each (the other factor detached);
- mixture of experts: the router's weights are detached;
- attention: the pattern is detached by detaching queries and keys, so no attention implementation is needed for it, or
  gradients go ``through`` it.

With them (and ``frozen`` attention) the metric is linear in the residual stream at every layer, up to biases, so that relevance is
conserved. Bach et al. 2015; Achtibat et al. 2024 (AttnLRP); Jafari et al. 2025 (RelP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from nsp.engine.runtime import MODULE, Runtime
from nsp.errors import InputError
from nsp.models.geometry import submodule

Attention = Literal["frozen", "through"]


@dataclass(frozen=True)
class Rules:
    """The rules of a gradient pass: ``attention`` frozen detaches the pattern, through lets gradients pass."""

    attention: Attention = "frozen"

    def __post_init__(self) -> None:
        if self.attention not in ("frozen", "through"):
            raise InputError(f"attention is 'frozen' or 'through', not {self.attention!r}")


RELP = Rules()


def check_rules(runtime: Runtime) -> None:
    """InputError where the model has a part that no rule covers."""
    refusal = uncovered(runtime)
    if refusal:
        raise InputError(f"no gradient rules for this model: {refusal}")


def norm_paths(runtime: Runtime, layer: int) -> tuple[str, ...]:
    """The norms of the residual stream inside a layer, by path in the layer: those of queries and keys are not among them."""
    table = runtime.geometry.table
    root = submodule(runtime.module, f"{table.layers}.{layer}")
    inside = table.attention + "." if table.attention else None
    return tuple(
        path
        for path, module in root.named_modules()
        if path and is_norm(module) and not (inside and path.startswith(inside))
    )


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a norm: named like one, and without submodules. Its form is checked when a rule is applied."""
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


@dataclass(frozen=True)
class Product:
    """One MLP of a layer: where its neurons are read, and the projections that its factors come from (component or path)."""

    neurons: str
    factors: tuple[str, ...]


def products(runtime: Runtime, layer: int) -> tuple[Product, ...]:
    """The MLPs of a layer: by the site table, and any other that gates (a shared expert, a plain layer among experts)."""
    geometry, table = runtime.geometry, runtime.geometry.table
    components = table.components
    mlps: list[Product] = []
    names: tuple[str, ...] = tuple(
        name for name in ("mlp_gate", "mlp_up") if name in components and layer in geometry.layers_of(name)
    )
    where = components.get("mlp_neurons")
    stated = ""
    if where is not None and where.side == "input" and layer in geometry.layers_of("mlp_neurons") and names:
        mlps.append(Product("mlp_neurons", names))
        stated = where.module.rpartition(".")[0]
    root = submodule(runtime.module, f"{table.layers}.{layer}")
    for path, module in root.named_modules():
        children = dict(module.named_children())
        if {"gate_proj", "up_proj", "down_proj"} <= set(children) and path != stated:
            base = f"{MODULE}{table.layers}.{layer}.{path}"
            mlps.append(Product(f"{base}.down_proj", (f"{base}.gate_proj", f"{base}.up_proj")))
    return tuple(mlps)


def experts_path(runtime: Runtime, layer: int) -> str | None:
    """Path of a layer's fused experts, relative to it, or None."""
    where = runtime.geometry.table.components.get("mlp_neurons")
    if where is None or where.side != "experts" or layer not in runtime.geometry.layers_of("mlp_neurons"):
        return None
    return where.module


def shared_gate_path(runtime: Runtime, layer: int) -> str | None:
    """Path of the gate that weighs a shared expert, whose weight is detached as the router's are, or None."""
    root = submodule(runtime.module, f"{runtime.geometry.table.layers}.{layer}")
    return next((path for path, _ in root.named_modules() if path.endswith("shared_expert_gate")), None)


def uncovered(runtime: Runtime) -> str:
    """Which part of the model has no rule, or empty."""
    geometry = runtime.geometry
    for layer in range(geometry.n_layers):
        root = submodule(runtime.module, f"{geometry.table.layers}.{layer}")
        mixer = next((path for path, module in root.named_modules() if hasattr(module, "A_log")), None)
        if mixer is not None:
            return f"layer {layer} has a state-space mixer ({mixer}); use atp, atp_ig, eap_ig or grad_x_act"
        if not products(runtime, layer) and experts_path(runtime, layer) is None:
            return f"layer {layer} has no MLP that nsp knows; use atp, atp_ig, eap_ig or grad_x_act"
    return ""
