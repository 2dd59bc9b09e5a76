"""A runtime whose programs run elsewhere: written down, sent as jobs when numbers are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nsp.backends.lazy import Graph, Shapes, Step, fetched
from nsp.engine.kernels import APPLIED
from nsp.engine.program import Outputs, Program
from nsp.engine.runtime import Runtime
from nsp.errors import InputError, NspError
from nsp.models.tables import SiteTable

Sender = Callable[[Any, list[Step], list[int], str], list[torch.Tensor]]
"""(nnsight model, steps, numbers of the wanted ones, attention implementation) -> their values, on the CPU."""


class RemoteRuntime(Runtime):
    """A model of which only the outline is needed here; ``sender`` runs jobs where the weights are."""

    together = 12

    def __init__(self, module: torch.nn.Module, tokenizer: Any, table: SiteTable | None, sender: Sender) -> None:
        if tokenizer is None:
            raise InputError("a model on a backend needs its tokenizer here: prompts are read on this side")
        super().__init__(module, tokenizer, table)
        self.sender = sender
        self.graph = Graph(self._send)

    @property
    def device(self) -> torch.device:
        """Where what is sent is made: here, on the CPU."""
        return torch.device("cpu")

    def weight(self, path: str) -> torch.Tensor:
        return self.graph.weight(path, super().weight(path))

    def fetch(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return fetched(values)

    def read_width(self, component: str) -> int:
        units = self.units(component)
        return units.rows * units.width

    def execute(self, program: Program) -> Outputs:
        """Write one program down; its outputs are fetched when their numbers are asked for."""
        geometry, config = self.geometry, self.module.config
        shapes = Shapes(self.dtype, geometry.d_model, geometry.vocab_size, geometry.n_kv_heads, geometry.head_dim)
        attention = str(getattr(config, "_attn_implementation", "") or "")
        return self.graph.run({**program, "head": geometry.table.head}, shapes, attention)

    def _send(self, steps: list[Step], wanted: list[int], attention: str) -> list[torch.Tensor]:
        try:
            return self.sender(self.envoy, steps, wanted, attention)
        except (NspError, ValueError) as error:
            # A function of the user's own that returned something that does not fit its site.
            said = [line for line in str(error).splitlines() if APPLIED in line]
            if said:
                raise InputError(said[-1][said[-1].index(APPLIED) :]) from None
            raise
