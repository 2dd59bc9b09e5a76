"""The engine's one front door: counterfactuals planned, estimated and measured; text, activations and gradients under them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Branches, Writes
from nsp.engine.budget import Budget
from nsp.engine.estimates import Estimate, estimate
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.generation import Decoding, When, generate
from nsp.engine.gradients import Gradients, Objective, Setting, gradients
from nsp.engine.lowering import site_slots
from nsp.engine.measured import Measured
from nsp.engine.measuring import Progress, measure
from nsp.engine.planning import plan
from nsp.engine.program import Readout
from nsp.engine.propagation_rules import Rules
from nsp.engine.recording import Prompts, Recording, record, recordings
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.slots import Slot
from nsp.interventions import Intervention
from nsp.sites import Site


@dataclass(frozen=True, eq=False)
class Tokens:
    """Generated text.

    Attributes:
        by_branch: token ids with axes (branch, step), -1 after the end of a text.
        of: the branches.
    """

    by_branch: np.ndarray
    of: Branches

    @property
    def ids(self) -> np.ndarray:
        """Token ids with axes (base, layer, position, unit, step), 1 where an axis is not swept; -1 after the end of a text
        and where a base has no such cell.
        """
        assert self.of.cells is not None
        ids: np.ndarray = np.nan_to_num(self.of.cells.scatter(self.by_branch), nan=-1)
        return ids.astype(np.int64)


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

    def plan(self, request: Request, *, further: bool = False) -> Branches:
        """The counterfactuals of a request; whatever can be wrong with it is an InputError here. Runs nothing but, on a
        model's first use, the self-check of the branch path.

        ``further``: the request has no interventions, and branches of its bases (`Bases.branches`) will start from their runs.
        """
        if (request.axes or further or not request.metrics) and request.path != "plain":
            ensure_checked(self.runtime)
        return plan(self.runtime, request, further=further)

    def estimate(self, branches: Branches, title: str = "", *, together: int | None = None) -> Estimate:
        """What branches and the runs of their bases will cost: passes, tokens, time and memory. Runs nothing.

        ``together``: how many bases run at a time; by default all.
        """
        return estimate(self.runtime, branches, self.budget, title, together=together)

    def measure(self, branches: Branches, *, progress: Progress | None = None) -> Measured:
        """Run branches and measure their metrics; ``progress`` is told (branches done, branches in all).

        The runs of their bases are made once, whatever number of branches start from them.
        """
        return measure(self.runtime, branches, self.budget, progress)

    def generate(
        self, branches: Branches, decoding: Decoding, *, when: When = "prompt", progress: Progress | None = None
    ) -> Tokens:
        """Generate text in every branch, with its interventions on the prompt, on the generated tokens, or on both.

        The branches are of a request without metrics.
        """
        ensure_checked(self.runtime)
        tokens = generate(self.runtime, branches, decoding, self.budget, when=when, progress=progress)
        return Tokens(tokens, branches)

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
        return record(
            self.runtime, prompts, site_slots(self.runtime, sites), writes=self._writes(prompts, writes), readout=readout,
            budget=self.budget, stay=stay,
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
