"""The engine's one front door: counterfactuals planned, estimated and measured; text, activations and gradients under them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsp.engine.branches import Writes
from nsp.engine.budget import Budget
from nsp.engine.generation import Decoding, When, generate_request
from nsp.engine.gradients import Gradients, Objective, gradients
from nsp.engine.lowering import Grid
from nsp.engine.outcome import Outcome
from nsp.engine.program import Readout
from nsp.engine.propagation_rules import Rules
from nsp.engine.propagation_rules import rules as following
from nsp.engine.recording import Prompts, Recording, record
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.schedule import Estimate, estimate
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.slots import Slot
from nsp.engine.sweep import run_request

Progress = Callable[[int, int], None]  # (branches done, branches in all)
Measured = Outcome


@dataclass(frozen=True, eq=False)
class Branches:
    """The counterfactuals of a request."""

    request: Request


@dataclass(frozen=True, eq=False)
class Tokens:
    """Generated token ids, axes (base, layer, position, unit, step), -1 after the end of a text; ``cells`` are their labels' grid."""

    ids: np.ndarray
    cells: Grid


class Engine:
    """What runs counterfactuals of one model within one memory budget.

    Attributes:
        memory: what passes may take beside the model (``4GB``, bytes); None takes a share of what is free.
    """

    def __init__(self, runtime: Runtime, memory: str | int | None = None) -> None:
        self.runtime, self.memory = runtime, memory

    @property
    def budget(self) -> Budget:
        """The bytes that passes may take now."""
        return Budget.of(self.memory, self.runtime.device)

    def within(self, memory: str | int | None) -> Engine:
        """The engine with another memory budget."""
        return Engine(self.runtime, memory)

    def plan(self, request: Request) -> Branches:
        """The counterfactuals of a request; whatever can be wrong with it is an InputError here. Runs nothing."""
        if request.axes and request.path != "plain":
            ensure_checked(self.runtime)
        return Branches(request)

    def estimate(self, branches: Branches, title: str = "") -> Estimate:
        """What the branches will cost: passes, tokens, time and memory. Runs nothing."""
        return estimate(self.runtime, branches.request, self.budget, title)

    def measure(self, branches: Branches, *, progress: Progress | None = None) -> Measured:
        """Run the branches and measure their metrics; ``progress`` is told (branches done, branches in all)."""
        return run_request(self.runtime, branches.request, self.budget, progress)

    def generate(
        self, branches: Branches, decoding: Decoding, *, when: When = "prompt", progress: Progress | None = None
    ) -> Tokens:
        """Generate text in every branch, with its interventions on the prompt, on the generated tokens, or on both."""
        ensure_checked(self.runtime)
        return Tokens(
            *generate_request(self.runtime, branches.request, decoding, self.budget, when=when, progress=progress)
        )

    def record(
        self,
        prompts: Prompts,
        slots: Collection[Slot],
        *,
        writes: Sequence[Writes] = (),
        readout: Readout | None = None,
        **options: Any,
    ) -> Recording:
        """Run prompts once and keep what is at ``slots``, and what a readout asks for (see `nsp.engine.recording.record`)."""
        return record(self.runtime, prompts, slots, writes=writes, readout=readout, **options)

    def gradients(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Iterable[Slot],
        objective: Objective,
        *,
        rules: Rules | None = None,
        **options: Any,
    ) -> Gradients:
        """Values and gradients of an objective at ``slots``, by plain backpropagation or by the LRP rules of ``rules``."""
        if rules is None:
            return gradients(self.runtime, prompts, slots, objective, **options)
        with following(self.runtime, rules):
            return gradients(self.runtime, prompts, slots, objective, **options)
