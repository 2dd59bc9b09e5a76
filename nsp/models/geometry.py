"""What a loaded model is made of: counts and widths, and where each component's units lie in its tensor.

Everything is read from the configuration and checked against the module tree when the model is loaded, so that a table that
does not fit is an error then and not an odd result later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nsp.errors import InputError
from nsp.models.tables import TABLES, SiteTable, Where
from nsp.sites import COMPONENTS

_BOUNDARY = ("resid_pre", "resid_post", "embed")


@dataclass(frozen=True)
class Units:
    """How one component's units lie in the last axis of its tensor.

    The tensor's last axis of size ``rows * width`` is viewed as ``(rows, width)``; unit ``i`` of the component is row
    ``index[i]``. ``count`` is the number of units the component has (1 where it has none).
    """

    rows: int
    width: int
    index: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Geometry:
    """Counts and widths of one model, with its site table.

    Attributes:
        n_layers, d_model, n_heads, n_kv_heads, head_dim, d_mlp, vocab_size: sizes; ``d_mlp`` is 0 where there is no
            plain MLP.
        softcap, logit_scale: what is done to the logits after the head (``softcap * tanh(x / softcap)``, ``x * scale``).
        residual_multiplier: what attention and MLP outputs are multiplied by before they are added (Granite), else 1.
        windows: the sliding window of each layer in tokens, or None where attention is global.
    """

    table: SiteTable
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    vocab_size: int
    softcap: float | None = None
    logit_scale: float = 1.0
    residual_multiplier: float = 1.0
    windows: tuple[int | None, ...] = ()

    def components(self) -> tuple[str, ...]:
        """The components this model has, in forward order."""
        inner = tuple(self.table.components)
        pattern = ("pattern",) if self.table.attention_call else ()
        return ("embed", "resid_pre", *inner, *pattern, "resid_post", "logits")

    def where(self, component: str) -> Where:
        """The table row of a component inside a layer; an error that says why where it does not exist."""
        found = self.table.components.get(component)
        if found is None:
            raise InputError(self._missing(component))
        return found

    def _missing(self, component: str) -> str:
        family = self.table.family
        if component == "resid_mid" and self.table.parallel:
            return (
                f"{family} has no resid_mid: its attention and MLP run in parallel on resid_pre, so there is no residual "
                "stream between them; use resid_pre, attn_out or mlp_out"
            )
        if component == "mlp_gate":
            return f"{family} has no mlp_gate: its MLP is not gated; use mlp_up (before the activation) or mlp_neurons"
        return f"{family} has no {component}; it has: {', '.join(self.components())}"

    def units(self, component: str) -> Units:
        """How the units of a component lie in its tensor (see `Units`)."""
        if component in _BOUNDARY or component in {"attn_out", "resid_mid", "mlp_out"}:
            return Units(1, self.d_model, (0,))
        if component == "logits":
            return Units(1, self.vocab_size, (0,))
        if component == "pattern":
            return Units(self.n_heads, 1, tuple(range(self.n_heads)))
        where = self.where(component)
        if component in {"mlp_gate", "mlp_up"} and where.fused:
            offset = 0 if component == "mlp_gate" else self.d_mlp
            return Units(2 * self.d_mlp, 1, tuple(range(offset, offset + self.d_mlp)))
        if component in {"mlp_gate", "mlp_up", "mlp_neurons"}:
            return Units(self.d_mlp, 1, tuple(range(self.d_mlp)))
        heads = self.n_kv_heads if component in {"k", "v"} else self.n_heads
        if not where.fused:
            return Units(heads, self.head_dim, tuple(range(heads)))
        total = self.n_heads + 2 * self.n_kv_heads
        return Units(total, self.head_dim, self._fused_rows(component, where))

    def _fused_rows(self, component: str, where: Where) -> tuple[int, ...]:
        heads, groups = self.n_heads, self.n_kv_heads
        if where.fused == "blocks":
            start = {"q": 0, "k": heads, "v": heads + groups}[component]
            return tuple(range(start, start + (heads if component == "q" else groups)))
        if where.fused == "interleaved":
            place = {"q": 0, "k": 1, "v": 2}[component]
            return tuple(3 * head + place for head in range(heads))
        per_group = heads // groups
        size = per_group + 2
        if component == "q":
            return tuple(group * size + i for group in range(groups) for i in range(per_group))
        place = per_group if component == "k" else per_group + 1
        return tuple(group * size + place for group in range(groups))

    def unit_count(self, component: str) -> int:
        """How many heads or neurons a component has; 0 where it has no units."""
        if component.startswith("module:"):
            return 0
        return self.units(component).count if COMPONENTS[component].unit else 0


def text_config(config: Any) -> Any:
    """The configuration of the language model inside a multimodal wrapper's, or the configuration itself."""
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def describe_model(module: torch.nn.Module, table: SiteTable | None = None) -> Geometry:
    """Read a causal language model's geometry and check it against its module tree.

    Raises InputError where the family has no table, or where a table's module is not in the model.
    """
    config = text_config(module.config)
    table = table or TABLES.get(config.model_type)
    if table is None:
        raise InputError(
            f"no site table for the architecture {config.model_type!r}; nsp has: {', '.join(sorted(TABLES))}"
        )
    n_heads = _first(config, "num_attention_heads", "n_head")
    d_model = _first(config, "hidden_size", "n_embd")
    layers = submodule(module, table.layers)
    first = layers[0]  # type: ignore[index]
    for component, where in table.components.items():
        try:
            submodule(first, where.module)
        except AttributeError:
            raise InputError(
                f"the site table of {table.family} does not fit {type(module).__name__}: {component} should be at "
                f"{table.layers}.0.{where.module}, which does not exist"
            ) from None
    down = table.components.get("mlp_neurons")
    return Geometry(
        table=table,
        n_layers=len(layers),  # type: ignore[arg-type]
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=getattr(config, "head_dim", None) or d_model // n_heads,
        d_mlp=_input_width(submodule(first, down.module)) if down else 0,
        vocab_size=config.vocab_size,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=_logit_scale(config),
        residual_multiplier=getattr(config, "residual_multiplier", None) or 1.0,
        windows=_windows(config, len(layers)),  # type: ignore[arg-type]
    )


def submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """The submodule at a dotted path (the module itself for an empty one)."""
    return module.get_submodule(path)


def _first(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise InputError(f"the configuration of {config.model_type} has none of {', '.join(names)}")


def _input_width(module: torch.nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    in_features = getattr(module, "in_features", None)
    # transformers' Conv1D (GPT-2) keeps its weight transposed and has no in_features.
    return int(in_features) if in_features is not None else int(weight.shape[0])


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies


def _windows(config: Any, n_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * n_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (int(window),) * n_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
