"""The engine's one front door: counterfactuals planned, estimated and measured; text, activations and gradients under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Writes
from nsp.engine.budget import Budget
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.generation import Decoding, When, generate_request
from nsp.engine.gradients import Gradients, Objective, Setting, gradients
from nsp.engine.lowering import Grid, site_slots
from nsp.engine.outcome import Outcome
from nsp.engine.program import Readout
from nsp.engine.propagation_rules import Rules
from nsp.engine.recording import Prompts, Recording, record, recordings
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.schedule import Estimate, estimate
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.slots import Slot
from nsp.engine.sweep import run_request
from nsp.interventions import Intervention
from nsp.sites import Site

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

    def __init__(self, runtime: Runtime, memory: str | float | None = None) -> None:
        self.runtime, self.memory = runtime, memory

    @property
    def budget(self) -> Budget:
        """The bytes that passes may take now."""
        return Budget.of(self.memory, self.runtime.device)

    def within(self, memory: str | float | None) -> Engine:
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
        sites: Iterable[str | Site | Slot] = (),
        *,
        writes: Sequence[Intervention] = (),
        readout: Readout | None = None,
        stay: bool = False,
    ) -> Recording:
        """Run whole prompts, in batches that fit the budget, and keep what is at sites.

        Args:
            sites: selectors or sites, of which components and layers count: all positions and units are kept.
            writes: interventions on the way, without donors; values are kept as they are after them.
            readout: places of ``prompts``, in ascending order of their rows, whose logits or metrics are kept.
            stay: leave the values on the server, for programs that read them.

        Returns:
            A `Recording`: ``recording.at("resid_post", 3)`` has dims (prompt, position, width).
        """
        tokens = [len(prompt) for prompt in prompts]
        return record(
            self.runtime, prompts, site_slots(self.runtime, sites), writes=self._writes(prompts, writes), readout=readout,
            max_tokens=max(tokens) * self.budget.plain_rows(self.runtime, max(tokens)), stay=stay,
        )  # fmt: skip

    def recordings(
        self,
        prompts: Prompts,
        sites: Iterable[str | Site | Slot],
        *,
        writes: Sequence[Intervention] = (),
        stay: bool = False,
    ) -> Iterator[Recording]:
        """`record` batch by batch, so that what is kept of all prompts need not fit into memory.

        ``rows`` of each recording says which of the prompts it holds; those of like length come together.
        """
        slots = site_slots(self.runtime, sites)
        return recordings(self.runtime, prompts, slots, self.budget, writes=self._writes(prompts, writes), stay=stay)

    def _writes(self, prompts: Prompts, interventions: Sequence[Intervention]) -> list[Writes]:
        if not interventions:
            return []
        given = [prompt if isinstance(prompt, Prompt) else Prompt.from_ids(prompt) for prompt in prompts]
        return FixedInterventions.of(self.runtime, interventions, given).writes(given)

    def gradients(
        self,
        prompts: Prompts,
        sites: Iterable[str | Site | Slot],
        objective: Objective,
        *,
        rules: Rules | None = None,
        settings: Sequence[Setting] = (),
        received: torch.Tensor | None = None,
    ) -> Gradients:
        """Values and gradients of an objective at sites: one forward and one backward pass for each batch of prompts.

        Args:
            sites: selectors or sites, of which components and layers count.
            objective: the metric, its tokens and its position in each prompt.
            rules: the LRP rules that the backward pass follows; None: the model's own derivatives.
            settings: tensors that are replaced in the forward pass.
            received: what the first layer of the sites receives, (row, position, width), so that those before it need not run.
        """
        slots = site_slots(self.runtime, sites)
        return gradients(self.runtime, prompts, slots, objective, rules=rules, settings=settings, received=received)
