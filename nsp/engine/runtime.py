"""A loaded model made ready to run programs: its nnsight wrapper, its geometry and its order of execution.

Only this package and ``nsp.backends`` know nnsight.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from nnsight import NNsight, TransformersModel

from nsp.engine.cost import Cost
from nsp.engine.differentiate import differentiate
from nsp.engine.execute import execute
from nsp.engine.execution_order import OUTPUT, TUPLE, watched
from nsp.engine.kernels import APPLIED
from nsp.engine.program import Outputs, Program
from nsp.engine.rotary_switch import RotarySwitch, forget_lengths, rotary_switch
from nsp.errors import InputError
from nsp.models.geometry import Geometry, Units, describe_model, submodule, text_config, unknown_attention
from nsp.models.tables import SiteTable, Where

MODULE = "module:"


class Runtime:
    """One model that programs run on.

    Attributes:
        envoy: the nnsight model (what ``model.nnsight`` hands out); ``programs`` the one that programs run on.
        module: the transformers model.
        geometry: its counts, widths and site table.
        branch_refusal: why the branch path must not be used on this model, or empty; filled by the self-check too.
    """

    def __init__(self, module: torch.nn.Module, tokenizer: Any, table: SiteTable | None = None) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.geometry: Geometry = describe_model(module, table)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A pipeline moves its model, which an outline without weights does not survive.
            place = {"device": "meta"} if all(weight.is_meta for weight in module.parameters()) else {}
            # Without a tokenizer there is no pipeline to build; token ids are all that a trace needs.
            self.envoy: Any = (
                NNsight(module)
                if tokenizer is None
                else TransformersModel(module, tokenizer=tokenizer, task="text-generation", **place)
            )
            # A wrapper with a tokenizer takes an attention mask for one tensor; these families have one a kind of attention.
            by_type = tokenizer is not None and self.geometry.table.window == "by_type"
            self.programs: Any = NNsight(module) if by_type else self.envoy
        self.branch_refusal: str = self.geometry.table.branch or unknown_attention(text_config(module.config))
        self.branch_checked = False
        self.head_checked = False
        self._module_events: dict[int, dict[tuple[str, str], int]] = {}
        self._tuples: dict[str, bool] = {}  # whether a submodule returns a tuple, by layer and path
        self._widths: dict[str, int] = {}  # how wide what it returns is

    @functools.cached_property
    def cost(self) -> Cost:
        """What a pass costs on this model (see `nsp.engine.pack`)."""
        layer = submodule(self.module, f"{self.geometry.table.layers}.0")
        parameters = sum(weight.numel() for weight in layer.parameters())
        return Cost.of(self.geometry, parameters, self.dtype.itemsize)

    @functools.cached_property
    def layer_paths(self) -> list[str]:
        """The path of each layer."""
        return [f"{self.geometry.table.layers}.{layer}" for layer in range(self.geometry.n_layers)]

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding: the ids that the model can read."""
        weight = submodule(self.module, self.geometry.table.embedding).weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[0])

    @functools.cached_property
    def rotary_switch(self) -> RotarySwitch | None:
        """The length beyond which the model's rotary frequencies are others, where there is one."""
        return rotary_switch(text_config(self.module.config))

    @property
    def longest_prompt(self) -> int | None:
        """The most tokens that the model's positions reach, where its configuration says; a rotary embedding of dynamic
        scale reaches any length.
        """
        config = text_config(self.module.config)
        if self.rotary_switch is not None and self.rotary_switch.kind == "dynamic":
            return None
        limit = getattr(config, "max_position_embeddings", None)
        return int(limit) if isinstance(limit, int) and limit > 0 else None

    @property
    def device(self) -> torch.device:
        """Where inputs go: with the token embedding, or the first weight that is not offloaded."""
        first: Any = submodule(self.module, self.geometry.table.embedding).weight
        if first.is_meta:  # offloaded; asked for very often, so the other weights are only looked at where it must be
            first = next((weight for weight in self.module.parameters() if not weight.is_meta), torch.zeros(0))
        device: torch.device = first.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def together(self) -> int:
        """How many programs are worth lowering before the first result is read: on a server they run as one job."""
        return 1
    # Whether bases and donors may run in the pass of their branches (see `nsp.engine.shared_pass`); the self-check says.
    shares_pass = True

    def weight(self, path: str) -> torch.Tensor:
        """A parameter of the model, by its path; on a server it stays there until a number of it is asked for."""
        return submodule(self.module, path.rpartition(".")[0]).get_parameter(path.rpartition(".")[2])

    def module_here(self, path: str) -> torch.nn.Module:
        """A small submodule (a norm, a projection, the head) with its weights here, to apply or read outside a run."""
        return submodule(self.module, path)

    @functools.cached_property
    def embedding_deviation(self) -> float:
        """Standard deviation of the token embedding's entries, the unit of injected noise."""
        return float(self.weight(f"{self.geometry.table.embedding}.weight").float().std())

    def fetch(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The values with their numbers here, which they have unless the model is on a server."""
        return list(values)

    def read_width(self, component: str) -> int:
        """How wide a read of a component is, where that must be known before the program has run; here never."""
        return 0

    def execute(self, program: Program) -> Outputs:
        """Run one program.

        Raises InputError where a function of the user's own (``apply``) returned something that does not fit its site.
        """
        for entry in program["layers"]:
            for visit in entry["visits"]:
                if visit["side"] in ("pattern", "call"):
                    # nnsight rewrites a forward when its source is first touched, which inside a running one is too late.
                    _ = self.programs.get(visit["module"]).source
        self._forget_lengths()
        if program["readout"] is not None and not self.head_checked:
            from nsp.engine.selfcheck import check_head  # here, since the check runs programs of its own

            self.head_checked = True
            try:
                check_head(self)
            except InputError:
                self.head_checked = False  # refused every time, not once
                raise
            program = {**program, "readout": {**program["readout"], "logit_scale": self.geometry.logit_scale}}
        try:
            return execute(self.programs, {**program, "head": self.geometry.table.head})
        except ValueError as error:
            if str(error).startswith(APPLIED):
                raise InputError(str(error)) from None
            raise

    def differentiate(self, program: Any, slots: Mapping[tuple[str, int], int]) -> dict[str, Any]:
        """Run one gradient program (`nsp.engine.gradients`); ``slots`` has the number of each slot's tracked tensor.

        Raises InputError where a gradient rule does not fit the model.
        """
        for stop in program["stops"]:
            if stop["side"] in ("pattern", "call"):
                # nnsight rewrites a forward when its source is first touched, which inside a running one is too late.
                _ = self.programs.get(stop["module"]).source
        self._forget_lengths()
        return differentiate(self.programs, program)

    def _forget_lengths(self) -> None:
        if self.rotary_switch is not None and self.rotary_switch.kind == "dynamic":
            forget_lengths(self.module)

    @contextmanager
    def attention_for(self, components: Iterable[str]) -> Iterator[None]:
        """Eager attention where the pattern is asked for: other implementations never make it.

        Every run of one request goes inside, so that its runs differ by their interventions alone.
        """
        if "pattern" not in set(components):
            yield
            return
        with self.attention("eager"):
            yield

    @contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Another attention implementation (``eager``, ``sdpa``) while the block runs."""
        config: Any = self.module.config
        before: str = config._attn_implementation
        if before == implementation:
            yield
            return
        self._set_attention(implementation)
        try:
            yield
        finally:
            self._set_attention(before)

    def _set_attention(self, implementation: str) -> None:
        module: Any = self.module
        module.set_attn_implementation(implementation)
        config = module.config
        if config._attn_implementation != implementation:
            # Falcon chooses by its configuration when it runs, though transformers takes it for fixed.
            config._attn_implementation_internal = implementation

    def units(self, component: str, layer: int | None = None) -> Units:
        """How a component's units lie in its tensor; a ``module:`` path has one unit a column."""
        if not component.startswith(MODULE):
            return self.geometry.units(component)
        width = self._module_width(component)
        return Units(width, 1, tuple(range(width)))

    def module_layer(self, component: str) -> int:
        """The layer that a ``module:`` component lies in."""
        path = component.removeprefix(MODULE)
        prefix = self.geometry.table.layers + "."
        number = path.removeprefix(prefix).split(".")[0]
        try:
            submodule(self.module, path)
        except AttributeError:
            raise InputError(
                f"{component}: the model has no submodule {path!r}; submodules of a layer look like "
                f"{prefix}0.{next(name for name, _ in submodule(self.module, prefix + '0').named_children())}"
            ) from None
        if not path.startswith(prefix) or not number.isdigit() or path == prefix + number:
            raise InputError(
                f"{component}: only submodules inside a layer ({prefix}<layer>.…) can be sites; for the stream between layers use "
                "resid_pre and resid_post, for the ends embed and logits"
            )
        return int(number)

    def locate(self, component: str) -> Where:
        """Where a component is inside its layer, relative to it."""
        if not component.startswith(MODULE):
            return self.geometry.where(component)
        layer = self.module_layer(component)
        inner = component.removeprefix(f"{MODULE}{self.geometry.table.layers}.{layer}.")
        stated = self.geometry.table.modules.get(inner)
        return stated or Where(inner, "output", self._tuple_index(layer, inner))

    def rank(self, component: str, layer: int, ordered: bool) -> float:
        """The place of a component in its layer's order of execution.

        ``ordered`` asks for the order found by watching one small forward pass, which ``module:`` sites need; the
        table's own order serves the others.
        """
        names = list(self.geometry.table.components)
        if not ordered:
            if component == "pattern":
                return names.index("z") - 0.5
            return float(names.index(component))
        events = self._events(layer)
        if component == "pattern":
            return events[(self.geometry.where("z").module, "input")] - 0.5
        where = self.locate(component)
        found = events.get((where.module, "output" if where.side == "output" else "input"))
        if found is None:
            raise InputError(
                f"{component}: the module never runs in a forward pass, so nothing can be read or written there"
            )
        return found + 0.5 if where.side in ("call", "experts") else float(found)

    def _events(self, layer: int) -> dict[tuple[str, str], int]:
        """When the submodules of a layer receive (``input``) and return (``output``), by path: the first time."""
        if not self._module_events:
            self._watch()
        return self._module_events[layer]

    def watched(self) -> torch.Tensor:
        """What `nsp.engine.execution_order.watched` sees of this model."""
        return watched(self.module, self.geometry.table.layers, self.geometry.n_layers)

    def _watch(self) -> None:
        layers = self.geometry.table.layers
        names = [
            [name for name, _ in submodule(self.module, f"{layers}.{layer}").named_modules()]
            for layer in range(self.geometry.n_layers)
        ]
        seen = self.watched().tolist()
        self._module_events = {layer: {} for layer in range(self.geometry.n_layers)}
        for layer, number, what, width in seen:
            name, events = names[layer][number], self._module_events[layer]
            events.setdefault((name, "output" if what & OUTPUT else "input"), len(events))
            if what & OUTPUT:
                self._tuples[f"{layer}.{name}"] = bool(what & TUPLE)
                self._widths.setdefault(f"{layer}.{name}", width)

    def _tuple_index(self, layer: int, inner: str) -> int | None:
        self._events(layer)
        return 0 if self._tuples.get(f"{layer}.{inner}") else None

    def _module_width(self, component: str) -> int:
        layer = self.module_layer(component)
        inner = component.removeprefix(f"{MODULE}{self.geometry.table.layers}.{layer}.")
        module = submodule(self.module, f"{self.geometry.table.layers}.{layer}.{inner}")
        for name in ("out_features", "nf"):
            if isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
        self._events(layer)
        width = self._widths.get(f"{layer}.{inner}", 0)
        if not width:
            raise InputError(f"{self.geometry.table.layers}.{layer}.{inner} returns no tensor in a forward pass")
        return width
