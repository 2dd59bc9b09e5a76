"""The numbers of branches as their passes come in, and what was measured, with its receipts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nsp.engine.branches import Branches, Cells
from nsp.engine.lowering import Resolved
from nsp.engine.passes import Lowered
from nsp.engine.program import Outputs
from nsp.engine.readout import at_head, combined
from nsp.engine.receipts import Receipt, receipts_of


@dataclass(eq=False)
class Measured:
    """What was measured of some `Branches`.

    Attributes:
        of: the branches.
        by_branch: one array per metric with axis (branch,); a pruned branch has the baseline's value, exactly.
        base, reference: one array per metric with axis (base,): the runs without the swept interventions, and the donor's
            (None where there is none).
        change_by_branch: L2 norm of what the branches' moving writes changed, (branch,); ``fired_by_branch`` how many
            were made: 0 where the effect is exactly zero and nothing ran.
        receipts: the evidence, one for each intervention of a request.
        passes: forward passes that ran for the branches.
    """

    of: Branches
    by_branch: list[np.ndarray]
    base: list[np.ndarray]
    reference: list[np.ndarray] | None
    change_by_branch: np.ndarray
    fired_by_branch: np.ndarray
    receipts: tuple[Receipt, ...]
    passes: int

    @property
    def path(self) -> str:
        """Which path ran; ``reason`` says why."""
        return self.of.bases.path

    @property
    def reason(self) -> str:
        return self.of.bases.reason

    @property
    def cells(self) -> Cells:
        assert self.of.cells is not None
        return self.of.cells

    @property
    def swept(self) -> tuple[Resolved, ...]:
        """The sites of the swept interventions."""
        return tuple(site for _, site, moving in self.of.stated if moving)

    @cached_property
    def values(self) -> list[np.ndarray]:
        """One array per metric with axes (base, layer, position, unit), 1 where an axis is not swept, NaN where a base has
        no such cell.
        """
        return [self.cells.scatter(values) for values in self.by_branch]

    @cached_property
    def change(self) -> np.ndarray:
        """L2 norm of what the swept interventions changed, same axes as ``values``."""
        return self.cells.scatter(self.change_by_branch)

    @cached_property
    def fired(self) -> np.ndarray:
        """How many writes the swept interventions made, same axes as ``values``."""
        return self.cells.scatter(self.fired_by_branch)

    @property
    def branches(self) -> int:
        """Branches that ran; ``pruned`` those whose effect is exactly zero."""
        return len(self.of.live)

    @property
    def pruned(self) -> int:
        return int(self.of.pruned.sum())


class Numbers:
    """Numbers of branches as their passes come in.

    Attributes:
        values: (measure, branch) float32; a pruned branch has the base run's value, exactly.
        fired, squared: for each of ``branches.acting``, by branch: how many writes were made, and the squared L2 norm of
            what they changed.
    """

    def __init__(
        self, branches: Branches, base: Sequence[np.ndarray], reference: Sequence[np.ndarray] | None = None
    ) -> None:
        self.branches, self.base, self.reference = branches, base, reference
        count, acting = len(branches), len(branches.acting)
        self.values = np.array([values[branches.base] for values in base], dtype=np.float32).reshape(len(base), count)
        self.fired = np.zeros((acting, count), dtype=np.int64)
        self.squared = np.zeros((acting, count))

    def add(self, lowered: Lowered, outputs: Outputs) -> None:
        """Put the outputs of one pass in place."""
        branches, measures = self.branches, self.branches.bases.measures
        bases = branches.base[lowered.branches]
        for (number, read), states in zip(lowered.streams, lowered.stream_reads(outputs), strict=True):
            self.values[number, lowered.branches[read]] = measures[number].projected(states).cpu().numpy()
        for number, metric in zip(at_head(measures), outputs["metrics"], strict=True):
            # A measured position before a branch's first change is the base run's.
            value = metric[: len(bases)].cpu().numpy()
            before = np.asarray(measures[number].positions)[bases] < branches.start[lowered.branches]
            self.values[number, lowered.branches] = np.where(before, self.base[number][bases], value)
        for (number, owners), norm in zip(lowered.norm_branches, outputs["norms"], strict=True):
            np.add.at(self.fired[number], owners, 1)
            np.add.at(self.squared[number], owners, norm.double().cpu().numpy() ** 2)

    def measured(self, passes: int) -> Measured:
        """The result, with receipts; NaN and infinity are reported, not averaged away."""
        branches, measures = self.branches, self.branches.bases.measures
        every, own = np.arange(len(branches.bases)), len(branches.carried)
        fired, squared = self.fired[own:], self.squared[own:]
        moving = [moving for _, _, moving in branches.stated] or [True] * len(fired)
        measured = Measured(
            branches,
            combined(measures, list(self.values), branches.base),
            combined(measures, self.base, every),
            None if self.reference is None else combined(measures, self.reference, every),
            np.sqrt(squared[moving].sum(axis=0)),
            fired[moving].sum(axis=0),
            receipts_of(branches, fired, squared),
            passes,
        )
        if branches.cells is not None:
            _report_nonfinite(measured)
        return measured


def _report_nonfinite(measured: Measured) -> None:
    """Warn of values that are NaN or infinite, with the sites that gave them."""
    names = {measure.number: measure.metric.name for measure in measured.of.bases.measures}
    for number, values in enumerate(measured.by_branch):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            named = "; ".join(_cell_name(measured, int(branch)) for branch in bad[:3])
            more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
            message = f"{names[number]}: {len(bad)} of {len(values)} values are NaN or infinite: {named}{more}. They are kept as they are"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _cell_name(measured: Measured, branch: int) -> str:
    """A cell for people: its sites with the layer, position and unit that it has."""
    branches, cells = measured.of, measured.cells
    base = int(branches.base[branch])
    layer, position, unit = np.unravel_index(branch - int(cells.offsets[base]), cells.sizes[base])
    sites = [item.site for item in measured.swept] or [item.site for _, item, _ in branches.stated]
    words = [", ".join(map(str, sites)) or "no intervention"]
    if measured.swept:
        item = measured.swept[0]
        words += [f"layer {item.layers[int(layer)]}"] if "layer" in cells.swept else []
        words += [f"position {item.positions[base][int(position)]}"] if "position" in cells.swept else []
        words += [f"unit {item.units[int(unit)]}"] if "unit" in cells.swept and item.units is not None else []
    prompt = branches.bases.prompts[base]
    return " ".join([*words, f"in prompt {base} ({getattr(prompt, 'title', str)()})"])
