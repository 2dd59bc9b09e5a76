"""A site table against a module tree: where its paths are, which layers have what, and how wide the tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nsp.errors import InputError
from nsp.models.tables import SiteTable


def relocated(module: torch.nn.Module, table: SiteTable) -> SiteTable:
    """The table with its paths as they are in this model: a multimodal wrapper keeps its language model deeper down."""
    root, _, tail = table.layers.rpartition(".")
    found = root
    if not _has(module, table.layers):
        inner = next(iter(table.components.values())).module if table.components else ""
        fitting = [
            name.rpartition(".")[0]
            for name, part in module.named_modules()
            if isinstance(part, torch.nn.ModuleList)
            and name.rpartition(".")[2] == tail
            and len(part)
            and _has(part[0], inner)
        ]
        texts = [name for name in fitting if "vision" not in name and "audio" not in name]
        if not texts:
            raise InputError(
                f"the site table of {table.name} does not fit {type(module).__name__}: there are no layers at {table.layers!r} "
                f"nor in any other list named {tail!r}"
            )
        found = texts[0]
    head = table.head if _has(module, table.head) else _path_of_head(module)
    if found == root and head == table.head:
        return table

    def moved(path: str) -> str:
        return found + path.removeprefix(root) if path.startswith(root) else path

    return replace(
        table,
        layers=moved(table.layers),
        final_norm=moved(table.final_norm),
        embedding=moved(table.embedding),
        head=head,
    )


def _has(module: torch.nn.Module, path: str) -> bool:
    try:
        found: torch.nn.Module | None = module.get_submodule(path)
    except AttributeError:
        return False
    return found is not None


def path_of(module: torch.nn.Module, getter: str) -> str | None:
    """The path of the module that one of transformers' getters (``get_output_embeddings``) returns, or None where there is none."""
    function = getattr(module, getter, None)
    try:
        wanted = function() if callable(function) else None
    except (NotImplementedError, AttributeError):
        return None
    return next((name for name, part in module.named_modules() if part is wanted), None)


def _path_of_head(module: torch.nn.Module) -> str:
    found = path_of(module, "get_output_embeddings")
    if found is None:
        raise InputError(f"{type(module).__name__} has no language-model head; load it as a causal language model")
    return found


def checked_layers(module: torch.nn.Module, table: SiteTable) -> list[torch.nn.Module]:
    for what in ("layers", "final_norm", "head", "embedding"):
        path = getattr(table, what)
        if not _has(module, path):
            raise InputError(
                f"the site table of {table.name} does not fit {type(module).__name__}: its {what} should be at {path}, which does "
                "not exist"
            )
    return list(module.get_submodule(table.layers).children())


def partial_layers(table: SiteTable, layers: list[torch.nn.Module], model: str) -> dict[str, tuple[int, ...]]:
    """The layers that have a component, for components that some lack; one that no layer has is an error."""
    partial = {}
    for component, where in table.components.items():
        having = tuple(at for at, layer in enumerate(layers) if _has(layer, where.module))
        if not having:
            raise InputError(
                f"the site table of {table.name} does not fit {model}: {component} should be at "
                f"{table.layers}.<layer>.{where.module}, which does not exist"
            )
        if len(having) < len(layers):
            partial[component] = having
    return partial


def _example(
    table: SiteTable, layers: list[torch.nn.Module], partial: Mapping[str, tuple[int, ...]], component: str
) -> torch.nn.Module | None:
    where = table.components.get(component)
    if where is None:
        return None
    return layers[partial.get(component, (0,))[0]].get_submodule(where.module)


def head_counts(
    table: SiteTable, layers: list[torch.nn.Module], partial: Mapping[str, tuple[int, ...]], config: Any
) -> tuple[int, int, int]:
    """Query heads, key/value heads and the head size, from the configuration and the widths of the projections."""
    if "z" not in table.components:
        return 0, 0, 0
    heads = stated_size(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    projection, key = _example(table, layers, partial, "z"), _example(table, layers, partial, "k")
    into = None if projection is None else widths(projection)[0]
    head_dim = into // heads if into else int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    out = None if key is None else widths(key)[1]
    if not out:
        return heads, int(getattr(config, "num_key_value_heads", None) or heads), head_dim
    rows = out // head_dim
    return heads, (rows - heads) // 2 if table.components["k"].fused else rows, head_dim


def neuron_count(table: SiteTable, layers: list[torch.nn.Module], partial: Mapping[str, tuple[int, ...]]) -> int:
    down = _example(table, layers, partial, "mlp_neurons")
    if down is None:
        return 0
    side = table.components["mlp_neurons"].side
    if side == "experts":
        return expert_count(down) * expert_width(down)
    return widths(down)[0 if side == "input" else 1] or 0


def expert_count(experts: torch.nn.Module) -> int:
    """How many experts a fused experts module holds."""
    return int(_expert_weight(experts).shape[0])


def expert_width(experts: torch.nn.Module) -> int:
    """How many neurons each expert of a fused experts module has."""
    shape = _expert_weight(experts).shape
    return int(shape[2] if getattr(experts, "is_transposed", False) else shape[1]) // 2


def _expert_weight(experts: torch.nn.Module) -> torch.Tensor:
    weight = getattr(experts, "gate_up_proj", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or not hasattr(experts, "_apply_gate"):
        raise InputError(
            f"{type(experts).__name__} does not hold its experts as one fused gate_up_proj of three axes, which reading their "
            "neurons needs; state a table without mlp_neurons (nsp.load(..., sites=...))"
        )
    return weight


def widths(module: torch.nn.Module) -> tuple[int | None, int | None]:
    """A linear module's input and output width; None where it is not known."""
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if into is None and isinstance(getattr(module, "nf", None), int):
        # transformers' Conv1D (GPT-2) keeps its weight transposed and has no in_features.
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[0]), int(weight.shape[1])
    return (int(into) if into is not None else None), (int(out) if out is not None else None)


def stated_size(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise InputError(f"the configuration of {config.model_type} has none of {', '.join(names)}")
