"""A runtime whose programs run elsewhere: written down, sent as jobs when numbers are asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nsp.backends.deferred_tensors import TOGETHER, Graph, Shapes, Step, fetched
from nsp.engine.kernels import APPLIED
from nsp.engine.program import Outputs, Program
from nsp.engine.propagation_rule_kernels import RULE
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY
from nsp.errors import InputError, NspError
from nsp.models.tables import SiteTable

# Numbers in a module that is kept once it was fetched; a larger one is fetched for each use.
_KEPT = 4_000_000
Sender = Callable[[Any, list[Step], list[int], str], list[torch.Tensor]]
"""(nnsight model, steps, numbers of the wanted ones, attention implementation) -> their values, on the CPU."""


class RemoteRuntime(Runtime):
    """A model of which only the outline is needed here; ``sender`` runs jobs where the weights are."""

    shares_pass = False  # a server gets plain objects of torch and transformers, no cache of our own

    def __init__(self, module: torch.nn.Module, tokenizer: Any, table: SiteTable | None, sender: Sender) -> None:
        if tokenizer is None:
            raise InputError("a model on a backend needs its tokenizer here: prompts are read on this side")
        super().__init__(module, tokenizer, table)
        self.sender = sender
        self.graph = Graph(self._send)
        self._here: dict[str, torch.nn.Module] = {}

    @property
    def together(self) -> int:
        return int(getattr(self.sender, "together", TOGETHER))

    @property
    def device(self) -> torch.device:
        """Where what is sent is made: here, on the CPU."""
        return torch.device("cpu")

    def weight(self, path: str) -> torch.Tensor:
        return self.graph.weight(path, super().weight(path))

    def module_here(self, path: str) -> torch.nn.Module:
        module = super().module_here(path)
        held = dict([*module.named_parameters(), *module.named_buffers()])
        if path not in self._here:
            there = [self.graph.weight(f"{path}.{name}", value) for name, value in held.items() if value.is_meta]
            names = [name for name, value in held.items() if value.is_meta]
            made = copy.deepcopy(module)
            state = dict(zip(names, self.fetch(there), strict=True))
            made.load_state_dict(state, strict=False, assign=True)
            made.requires_grad_(False)
            if sum(value.numel() for value in held.values()) > _KEPT:
                return made
            self._here[path] = made
        return self._here[path]

    def fetch(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return fetched(values)

    def read_width(self, component: str) -> int:
        units = self.units(component)
        return units.rows * units.width

    def execute(self, program: Program) -> Outputs:
        """Write one program down; its outputs are fetched when their numbers are asked for."""
        return self.graph.run({**program, "head": self.geometry.table.head}, self._shapes(), self._attention())

    def differentiate(self, program: Any, slots: Mapping[tuple[str, int], int]) -> dict[str, Any]:
        """Write a gradient program down; its outputs are fetched when their numbers are asked for."""
        rows, columns = program["inputs"]["input_ids"].shape
        shapes: dict[int, tuple[int, ...]] = {}
        for (component, _), number in slots.items():
            if component == "pattern":
                shapes[number] = (rows, self.read_width(component), columns, columns)
            else:
                width = self.geometry.d_model if component == BOUNDARY else self.read_width(component)
                shapes[number] = (rows, columns, width)
        tracked = [shapes[number] for number in range(len(shapes))]
        return self.graph.differentiate(program, tracked, self._shapes(), self._attention())

    def watched(self) -> torch.Tensor:
        """What runs in which order: seen here on the outline where its family allows, else on the server."""
        try:
            return super().watched()
        except (RuntimeError, NotImplementedError):
            # Many a forward asks for a number, which a model without weights does not have.
            step = {"do": "watch", "layers": self.geometry.table.layers, "count": self.geometry.n_layers}
            return self._send([step], [0], "")[0]

    def _shapes(self) -> Shapes:
        geometry = self.geometry
        return Shapes(self.dtype, geometry.d_model, geometry.vocab_size, geometry.n_kv_heads, geometry.head_dim)

    def _attention(self) -> str:
        return str(getattr(self.module.config, "_attn_implementation", "") or "")

    def _send(self, steps: list[Step], wanted: list[int], attention: str) -> list[torch.Tensor]:
        try:
            return self.sender(self.envoy, steps, wanted, attention)
        except (NspError, ValueError) as error:
            # A function of the user's own that returned something that does not fit its site, or a gradient rule that
            # does not fit the model.
            for known in (APPLIED, RULE):
                said = [line for line in str(error).splitlines() if known in line]
                if said:
                    raise InputError(said[-1][said[-1].index(known) :]) from None
            raise
