"""A second opinion: activations read and written with raw PyTorch hooks, one full forward pass a counterfactual.

Knows transformers' Llama and GPT-2 classes and nothing of nsp: no site table, no engine, no nnsight. Tests compare the
engine with it. Values have axes (position, unit, width); components without units have one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Change = Callable[[torch.Tensor], torch.Tensor]
LAYERED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")


@dataclass(frozen=True)
class Edit:
    """``change`` maps a component's value (position, unit, width) in one layer to the value that replaces it."""

    component: str
    layer: int
    change: Change


class HookedReference:
    """One causal language model of transformers, run with hooks."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.llama = module.config.model_type == "llama"
        config = module.config
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.layers = module.model.layers if self.llama else module.transformer.h

    def components(self) -> tuple[str, ...]:
        """Every component that the model has, ``embed`` and one submodule path among them."""
        inner = ("mlp_gate", "mlp_up", "mlp_neurons") if self.llama else ("mlp_up", "mlp_neurons")
        return (*LAYERED, *inner)

    def logits(self, ids: Sequence[int], edits: Sequence[Edit] = ()) -> torch.Tensor:
        """Logits (position, token) in float64, with the edits made in the order given at each site."""
        with torch.no_grad(), self._installed(edits):
            output = self.module(input_ids=torch.tensor([list(ids)]), use_cache=False)
        return output.logits[0].double()

    def values(
        self, ids: Sequence[int], sites: Sequence[tuple[str, int]], edits: Sequence[Edit] = ()
    ) -> dict[tuple[str, int], torch.Tensor]:
        """The sites' values (position, unit, width), after the edits."""
        kept: dict[tuple[str, int], torch.Tensor] = {}

        def keep(site: tuple[str, int]) -> Change:
            def change(value: torch.Tensor) -> torch.Tensor:
                kept[site] = value.clone()
                return value

            return change

        reading = [*edits, *(Edit(component, layer, keep((component, layer))) for component, layer in sites)]
        with torch.no_grad(), self._installed(reading):
            self.module(input_ids=torch.tensor([list(ids)]), use_cache=False)
        return kept

    @contextmanager
    def _installed(self, edits: Sequence[Edit]) -> Iterator[None]:
        with ExitStack() as stack:
            patterns: dict[int, list[Change]] = {}
            for edit in edits:
                if edit.component == "pattern":
                    patterns.setdefault(edit.layer, []).append(edit.change)
                else:
                    stack.callback(self._hook(edit).remove)
            if patterns:
                stack.enter_context(self._patterns(patterns))
            yield

    # --- hooks ------------------------------------------------------------------------------------------------------

    def _hook(self, edit: Edit) -> Any:
        component, change = edit.component, edit.change
        if component == "embed":
            return self._on_input(self.layers[0], change, 1)
        layer = self.layers[edit.layer]
        if component.startswith("module:"):
            return self._on_output(self.module.get_submodule(component.removeprefix("module:")), change, -1)
        if component == "resid_pre":
            return self._on_input(layer, change, 1)
        if component == "resid_post":
            return self._on_output(layer, change, 1)
        if component == "resid_mid":
            return self._on_mid(layer, change)
        return self._inside(layer, component, change)

    def _inside(self, layer: Any, component: str, change: Change) -> Any:
        if self.llama:
            attention, mlp = layer.self_attn, layer.mlp
            outputs = {
                "q": (attention.q_proj, self.heads),
                "k": (attention.k_proj, self.kv_heads),
                "v": (attention.v_proj, self.kv_heads),
                "attn_out": (attention, 1),
                "mlp_out": (mlp, 1),
                "mlp_gate": (mlp.gate_proj, -1),
                "mlp_up": (mlp.up_proj, -1),
            }
            inputs = {"z": (attention.o_proj, self.heads), "mlp_neurons": (mlp.down_proj, -1)}
        else:
            attention, mlp = layer.attn, layer.mlp
            if component in ("q", "k", "v"):
                return self._on_third(attention.c_attn, "qkv".index(component), change)
            outputs = {"attn_out": (attention, 1), "mlp_out": (mlp, 1), "mlp_up": (mlp.c_fc, -1)}
            inputs = {"z": (attention.c_proj, self.heads), "mlp_neurons": (mlp.c_proj, -1)}
        if component in inputs:
            module, units = inputs[component]
            return self._on_input(module, change, units)
        module, units = outputs[component]
        return self._on_output(module, change, units)

    @staticmethod
    def _changed(value: torch.Tensor, change: Change, units: int) -> torch.Tensor:
        count = value.shape[-1] if units < 0 else units
        view = value[0].reshape(value.shape[1], count, -1)
        return change(view.clone()).to(value.dtype).reshape(value.shape)

    def _on_input(self, module: Any, change: Change, units: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (self._changed(args[0], change, units), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._changed(kwargs["hidden_states"], change, units)}

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _on_output(self, module: Any, change: Change, units: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._changed(output[0], change, units), *output[1:])
            return self._changed(output, change, units)

        return module.register_forward_hook(hook)

    def _on_third(self, module: Any, which: int, change: Change) -> Any:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            parts = list(output.chunk(3, dim=-1))
            parts[which] = self._changed(parts[which], change, self.heads)
            return torch.cat(parts, dim=-1)

        return module.register_forward_hook(hook)

    def _on_mid(self, layer: Any, change: Change) -> Any:
        """The stream between attention and MLP is a sum, so the change is put into attention's output."""
        received: list[torch.Tensor] = []

        def before(_module: Any, args: Any, kwargs: Any) -> None:
            received[:] = [args[0] if args else kwargs["hidden_states"]]

        def after(_module: Any, _args: Any, output: Any) -> Any:
            middle = received[0] + output[0]
            return (self._changed(middle, change, 1) - received[0], *output[1:])

        first = layer.register_forward_pre_hook(before, with_kwargs=True)
        second = (layer.self_attn if self.llama else layer.attn).register_forward_hook(after)

        class Both:
            @staticmethod
            def remove() -> None:
                first.remove()
                second.remove()

        return Both()

    @contextmanager
    def _patterns(self, changes: dict[int, list[Change]]) -> Iterator[None]:
        """Attention written out by hand, with the weights (position, head, key position) open to changes."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        def attend(
            module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            groups = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
            factor = query.shape[-1] ** -0.5 if scaling is None else scaling
            scores = query @ key.transpose(2, 3) * factor
            above = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            weights = torch.softmax(scores.masked_fill(above, float("-inf")), dim=-1)
            for change in changes.get(module.layer_idx, ()):
                weights = change(weights[0].transpose(0, 1).clone()).transpose(0, 1)[None]
            return (weights @ value).transpose(1, 2).contiguous(), weights

        AttentionInterface.register("by_hand", attend)
        AttentionMaskInterface.register("by_hand", eager_mask)
        before = self.module.config._attn_implementation
        self.module.set_attn_implementation("by_hand")
        try:
            yield
        finally:
            self.module.set_attn_implementation(before)


def replacing(donor: torch.Tensor, positions: Sequence[int] | None, units: Sequence[int] | None) -> Change:
    """Replace the given positions (and units) by the donor's value at the same places."""

    def change(value: torch.Tensor) -> torch.Tensor:
        return at(value, positions, units, lambda _old, where: donor.to(value.dtype)[where])

    return change


def computing(function: Change, positions: Sequence[int] | None = None, units: Sequence[int] | None = None) -> Change:
    """Replace the given positions (and units) by a function of their value."""
    return lambda value: at(value, positions, units, lambda old, _where: function(old))


def at(
    value: torch.Tensor,
    positions: Sequence[int] | None,
    units: Sequence[int] | None,
    new: Callable[[torch.Tensor, Any], torch.Tensor],
) -> torch.Tensor:
    """``value`` with the selected (position, unit) block replaced."""
    rows = torch.arange(value.shape[0]) if positions is None else torch.tensor(list(positions))
    columns = torch.arange(value.shape[1]) if units is None else torch.tensor(list(units))
    where = (rows[:, None], columns[None, :])
    value[where] = new(value[where], where).to(value.dtype)
    return value
