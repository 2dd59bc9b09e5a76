"""Many units ablated at once, by mask: a circuit's outside, its inside, or any other set, one branch a set.

A branch writes each layer and position where it ablates anything once, as one blend of the whole tensor: the units that it keeps
have whatever value the branch gives them, the others the donor's. So a branch with 46 000 ablated neurons costs what any other
branch costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Held, Ints, Source, Writes
from nsp.engine.budget import Budget
from nsp.engine.donors import Donor, donor_source
from nsp.engine.lowering import Resolved
from nsp.engine.measuring import measure
from nsp.engine.planning import plan
from nsp.engine.program import Step
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.metrics import Metric
from nsp.sites import Site

Mask = npt.NDArray[np.bool_]
# Of the masks of one batch of branches.
_MASK_BYTES = 1e8


@dataclass(frozen=True, eq=False)
class BlendWrites(Writes):
    """Writes that keep some columns of a whole tensor: ``kept`` (write, width), one row for each write."""

    kept: Mask | None = None

    def where(self, mask: Mask) -> BlendWrites:
        assert self.kept is not None
        return replace(
            self, branch=self.branch[mask], layer=self.layer[mask], position=self.position[mask], unit=self.unit[mask],
            kept=self.kept[mask],
        )  # fmt: skip

    def step(
        self, chosen: Ints, base: Ints, batch: Ints, column: Ints, device: torch.device, held: Held | None = None
    ) -> Step:
        step = super().step(chosen, base, batch, column, device, held)
        assert self.kept is not None
        step["keep"] = torch.as_tensor(self.kept[chosen], device=device)
        return step


class MaskedRuns:
    """Ablations of sets of units on one prompt; the ordinary run is made once, for all of them.

    Attributes:
        base: the metric in the ordinary run.
    """

    def __init__(self, runtime: Runtime, prompt: Prompt, metric: Metric, tokens: torch.Tensor, budget: Budget) -> None:
        self.runtime, self.prompt, self.budget = runtime, prompt, budget
        request = Request((prompt,), metrics=(metric,), tokens=(tokens.reshape(1, -1),))
        self.bases = plan(runtime, request, further=True).bases
        self.base = float(measure(runtime, self.bases.branches(), budget).base[0][0])
        self.sources: dict[tuple[str, int], tuple[Resolved, Source, Donor]] = {}

    def run(self, site: Site, donor: Donor, kept: Mask) -> np.ndarray:
        """The metric of each set, (set,). ``kept`` (set, layer, position, unit) is False where a unit of ``site`` is ablated."""
        item, source = self._source(site, donor)
        expected = (len(item.layers), len(item.positions[0]), self.runtime.units(site.component).count)
        if item.units is not None or item.slot_component == "pattern":
            raise InputError(
                f"{site}: masks choose units themselves; give a component with heads or neurons, without units"
            )
        if kept.shape[1:] != expected:
            raise InputError(f"{site} has (layers, positions, units) {expected}; the masks have {kept.shape[1:]}")
        each = max(1, int(_MASK_BYTES // max(1, kept[:1].size)))
        parts = [self._run(site, item, source, kept[low : low + each]) for low in range(0, len(kept), each)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)

    def _source(self, site: Site, donor: Donor) -> tuple[Resolved, Source]:
        key = (str(site), id(donor))
        if key not in self.sources:
            # The donor is kept beside its source, so that its id stays its own.
            self.sources[key] = (*donor_source(self.runtime, site, (self.prompt,), donor), donor)
        return self.sources[key][:2]

    def _run(self, site: Site, item: Resolved, source: Source, kept: Mask) -> np.ndarray:
        units = self.runtime.units(site.component)
        branch, layer, place = np.nonzero(~kept.all(axis=3))
        # Rows of the tensor that are not this component's (a fused projection's) stay as they are.
        columns = np.ones((len(branch), units.rows, units.width), dtype=bool)
        columns[:, list(units.index)] = kept[branch, layer, place][:, :, None]
        writes = BlendWrites(
            item.slot_component, "blend", 1, branch, np.asarray(item.slot_layers)[layer],
            np.asarray(item.positions[0])[place], np.zeros_like(branch), source, kept=columns.reshape(len(branch), -1),
        )  # fmt: skip
        branches = self.bases.branches(np.zeros(len(kept), dtype=np.int64), [writes])
        return measure(self.runtime, branches, self.budget).by_branch[0]
