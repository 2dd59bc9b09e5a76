"""What a loaded model is made of: counts and widths, and where each component's units lie in its tensor.

Everything is read from the configuration and checked against the module tree when the model is loaded, so that a table that
does not fit is an error then and not an odd result later.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nsp.errors import InputError
from nsp.models.families import TABLES, table_for
from nsp.models.fitting import checked_layers, head_counts, neuron_count, partial_layers, relocated, stated_size, widths
from nsp.models.inference import infer_table
from nsp.models.tables import SiteTable, Where
from nsp.sites import COMPONENTS


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
            plain MLP, the head counts where there is no attention. In a mixture of experts it counts every expert's neurons.
        softcap, logit_scale: what is done to the logits after the head (``softcap * tanh(x / softcap)``, ``x * scale``).
        residual_multiplier: what attention and MLP outputs are multiplied by before they are added (Granite), else 1.
        windows: the sliding window of each layer in tokens, or None where attention is global.
        partial: component -> the layers that have it, for components that some layers lack.
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
    partial: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def components(self) -> tuple[str, ...]:
        """The components this model has, in forward order."""
        inner = [name for name in self.table.components if self.partial.get(name) != ()]
        pattern = ("pattern",) if self.table.attention_call else ()
        return ("embed", "resid_pre", *inner, *pattern, "resid_post", "logits")

    def layers_of(self, component: str) -> tuple[int, ...]:
        """The layers that have a component."""
        if component == "pattern":
            component = "z"
        return self.partial.get(component, tuple(range(self.n_layers)))

    def require(self, component: str, layers: tuple[int, ...]) -> None:
        """Raise InputError where one of ``layers`` lacks a component that the family has."""
        having = self.layers_of(component)
        lacking = [layer for layer in layers if layer not in having]
        if lacking:
            shown = ", ".join(map(str, having))
            raise InputError(
                f"layer {lacking[0]} of this {self.table.family} has no {component}; layers that have it: {shown}"
            )

    def where(self, component: str) -> Where:
        """The table row of a component inside a layer; an error that says why where it does not exist."""
        found = self.table.components.get(component)
        if found is None or self.partial.get(component) == ():
            raise InputError(self._missing(component))
        return found

    def _missing(self, component: str) -> str:
        family = self.table.name
        if component in self.table.missing:
            return f"{family} has no {component}: {self.table.missing[component]}"
        if component == "resid_mid" and self.table.parallel:
            return (
                f"{family} has no resid_mid: its attention and MLP run in parallel on resid_pre, so there is no residual "
                "stream between them; use resid_pre, attn_out or mlp_out"
            )
        if component == "mlp_gate" and "mlp_up" in self.table.components:
            return f"{family} has no mlp_gate: its MLP is not gated; use mlp_up (before the activation) or mlp_neurons"
        return f"{family} has no {component}; it has: {', '.join(self.components())}"

    def units(self, component: str) -> Units:
        """How the units of a component lie in its tensor (see `Units`)."""
        known = COMPONENTS[component]
        if known.unit is None:
            return Units(1, self.vocab_size if component == "logits" else self.d_model, (0,))
        if component == "pattern":
            return Units(self.n_heads, 1, tuple(range(self.n_heads)))
        where = self.where(component)
        if known.unit == "neuron" and where.fused:
            offset = 0 if component == "mlp_gate" else self.d_mlp
            return Units(2 * self.d_mlp, 1, tuple(range(offset, offset + self.d_mlp)))
        if known.unit == "neuron":
            return Units(self.d_mlp, 1, tuple(range(self.d_mlp)))
        heads = self.n_kv_heads if known.key_value else self.n_heads
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
        known = COMPONENTS.get(component)
        return self.units(component).count if known is not None and known.unit else 0


def text_config(config: Any) -> Any:
    """The configuration of the language model inside a multimodal wrapper's, or the configuration itself."""
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def describe_model(module: torch.nn.Module, table: SiteTable | None = None) -> Geometry:
    """Read a causal language model's geometry and check it against its module tree.

    A family without a table is inferred from its module tree, with a warning that says what was assumed. Raises InputError where
    that fails, or where a table does not fit the model.
    """
    config = text_config(module.config)
    if table is None:
        table = table_for(config)
    if table is None:
        table = _inferred(module, config)
    table = relocated(module, table)
    layers = checked_layers(module, table)
    partial = partial_layers(table, layers, type(module).__name__)
    heads, d_model = (
        head_counts(table, layers, partial, config),
        stated_size(config, "hidden_size", "n_embd", "d_model"),
    )
    geometry = Geometry(
        table=table,
        n_layers=len(layers),
        d_model=d_model,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=heads[2],
        d_mlp=neuron_count(table, layers, partial),
        vocab_size=config.vocab_size,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=_logit_scale(config),
        residual_multiplier=getattr(config, "residual_multiplier", None) or 1.0,
        windows=_windows(config, len(layers)),
        partial=partial,
    )
    _check_widths(geometry, layers)
    return geometry


def _inferred(module: torch.nn.Module, config: Any) -> SiteTable:
    found = infer_table(module, config)
    if found is None:
        raise InputError(
            f"no site table for the architecture {config.model_type!r}, and none could be inferred from its modules; "
            f"state one with nsp.load(..., sites=SiteTable(...)). nsp has tables for: {', '.join(sorted(TABLES))}"
        )
    table, assumed = found
    message = (
        f"nsp has no site table for the architecture {config.model_type!r}; it was inferred from the modules and one forward pass: "
        f"{'; '.join(assumed)}. `nsp check` tests it; nsp.load(..., sites=SiteTable(...)) states another."
    )
    warnings.warn(message, RuntimeWarning, stacklevel=4)
    return table


def submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """The submodule at a dotted path (the module itself for an empty one)."""
    return module.get_submodule(path)


def _check_widths(geometry: Geometry, layers: list[torch.nn.Module]) -> None:
    """Every component's units must fill its tensor, as far as the modules' widths are known."""
    for component, where in geometry.table.components.items():
        if where.side == "experts" or where.index is not None:
            continue
        for number in geometry.layers_of(component):
            into, out = widths(submodule(layers[number], where.module))
            found = into if where.side == "input" else out
            units = geometry.units(component)
            if found and found != units.rows * units.width:
                raise InputError(
                    f"the site table of {geometry.table.name} does not fit: {component} in layer {number} ({where.module}, "
                    f"{where.side}) is {found} wide, where {units.rows} x {units.width} was expected"
                )


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / float(config.logits_scaling)
    return float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies


# Kinds of attention, by the configuration's ``layer_types``, of which a causal mask with windows says everything.
_MASKED = frozenset({"full_attention", "sliding_attention"})


def unknown_attention(config: Any) -> str:
    """Why branches must not share passes of this model: layers whose attention nsp's masks do not know; else empty."""
    kinds = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - _MASKED)
    return f"its layers have attention of kind {', '.join(kinds)}, which nsp's masks do not know" if kinds else ""


def _windows(config: Any, n_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * n_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (int(window),) * n_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
