"""What comes out of a request: the numbers of its branches as their passes come in, and the outcome with its receipts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nsp.engine.branches import BranchTable
from nsp.engine.lowering import Grid, Operand, Resolved
from nsp.engine.passes import Lowered
from nsp.engine.program import Outputs
from nsp.engine.readout import Measure, at_head, combined
from nsp.engine.receipts import Receipt, receipts_of
from nsp.engine.recording import Recording
from nsp.engine.request import Request


@dataclass(eq=False)
class Outcome:
    """What came out of a `Request`.

    Attributes:
        grid: the cells; ``swept`` the resolved sites.
        values: one array a metric with axes (base, layer, position, unit), 1 where an axis is not swept, NaN
            where a base has no such cell.
        base, reference: one array a metric with axis (base,): the run without the swept interventions, and the donor's.
        change: L2 norm of what the swept interventions changed, same axes as ``values``; NaN where there is no cell.
        fired: how many writes the swept interventions made, same axes; 0 where the effect is exactly zero and
            nothing ran.
        receipts: the evidence, one for each intervention.
        path, reason: which path ran, and why.
        passes, branches, pruned: counts.
    """

    grid: Grid
    swept: tuple[Resolved, ...]
    values: list[np.ndarray]
    base: list[np.ndarray]
    reference: list[np.ndarray] | None
    change: np.ndarray
    fired: np.ndarray
    receipts: tuple[Receipt, ...]
    path: str
    reason: str
    passes: int
    branches: int
    pruned: int
    warnings: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Prepared:
    """A request with everything known before its branches run; ``base`` and ``reference`` have one array a measure."""

    request: Request
    resolved: list[tuple[Resolved, Operand, bool]]
    grid: Grid
    table: BranchTable
    trunk: Recording
    measures: list[Measure]
    base: list[np.ndarray]
    reference: list[np.ndarray] | None


class Numbers:
    """Numbers of a table's branches as their passes come in.

    Attributes:
        values: (measure, branch) float32; a pruned branch has the base run's value, exactly.
        fired, squared: for each of the table's writes, by branch: how many were made, and the squared L2 norm of what
            they changed.
    """

    def __init__(self, table: BranchTable, measures: Sequence[Measure], base: Sequence[np.ndarray]) -> None:
        self.table, self.measures, self.base = table, measures, base
        bases = [values[table.base] for values in base]
        self.values = np.stack(bases) if bases else np.zeros((0, len(table)), dtype=np.float32)
        self.fired = [np.zeros(len(table), dtype=np.int64) for _ in table.writes]
        self.squared = [np.zeros(len(table)) for _ in table.writes]

    def add(self, lowered: Lowered, outputs: Outputs) -> None:
        """Put the outputs of one pass in place."""
        self.place(lowered, [values.cpu().numpy() for values in outputs["metrics"]], outputs)

    def place(self, lowered: Lowered, restored: Sequence[np.ndarray], outputs: Outputs) -> None:
        """The same, with the metrics in the order of the pass's branches: one array with axis (branch,) a measure."""
        table, measures = self.table, self.measures
        bases = table.base[lowered.branches]
        for (number, read), states in zip(lowered.streams, outputs["reads"], strict=True):
            self.values[number, lowered.branches[read]] = measures[number].projected(states).cpu().numpy()
        for number, value in zip(at_head(measures), restored, strict=True):
            # A measured position before a branch's first change is the base run's.
            before = np.asarray(measures[number].positions)[bases] < table.start[lowered.branches]
            self.values[number, lowered.branches] = np.where(before, self.base[number][bases], value)
        for (number, owners), norm in zip(lowered.norm_branches, outputs["norms"], strict=True):
            np.add.at(self.fired[number], owners, 1)
            np.add.at(self.squared[number], owners, norm.double().cpu().numpy() ** 2)


class Tally(Numbers):
    """Numbers of a request's branches as their passes come in."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.table, prepared.measures, prepared.base)
        self.prepared = prepared

    def outcome(self, path: str, reason: str, passes: int) -> Outcome:
        """The result, with receipts; NaN and infinity are reported, not averaged away."""
        prepared, request, table = self.prepared, self.prepared.request, self.prepared.table
        sites = [item for item, _, _ in prepared.resolved]
        receipts = receipts_of([*request.swept, *request.fixed], sites, table, self.fired, self.squared, path, reason)
        moved = [squared for squared, (_, _, moving) in zip(self.squared, prepared.resolved, strict=True) if moving]
        change = np.sqrt(np.sum(moved, axis=0)) if moved else np.zeros(len(table))
        counts = [fired for fired, (_, _, moving) in zip(self.fired, prepared.resolved, strict=True) if moving]
        writes = np.sum(counts, axis=0) if counts else np.zeros(len(table))
        measures, bases = prepared.measures, np.arange(len(request.bases))
        values = combined(measures, list(self.values), table.base)
        outcome = Outcome(
            grid=prepared.grid,
            swept=tuple(item for item, _, moving in prepared.resolved if moving),
            values=[prepared.grid.scatter(value) for value in values],
            base=combined(measures, prepared.base, bases),
            reference=None if prepared.reference is None else combined(measures, prepared.reference, bases),
            change=prepared.grid.scatter(change),
            fired=prepared.grid.scatter(writes),
            receipts=receipts,
            path=path,
            reason=reason,
            passes=passes,
            branches=len(table.live),
            pruned=int(table.pruned.sum()),
        )
        _report_nonfinite(outcome, request)
        return outcome


def _report_nonfinite(outcome: Outcome, request: Request) -> None:
    """Warn of values that are NaN or infinite, with the sites that gave them."""
    for metric, values in zip(request.metrics, outcome.values, strict=True):
        bad = [
            (base, *cell)
            for base, size in enumerate(outcome.grid.sizes)
            for cell in np.argwhere(~np.isfinite(values[base][tuple(map(slice, size))]))
        ]
        if bad:
            named = "; ".join(_cell_name(outcome, request, *map(int, cell)) for cell in bad[:3])
            more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
            message = f"{metric.name}: {len(bad)} of {sum(outcome.grid.counts)} values are NaN or infinite: {named}{more}. They are kept as they are"
            outcome.warnings.append(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _cell_name(outcome: Outcome, request: Request, base: int, layer: int, position: int, unit: int) -> str:
    """A cell for people: its sites with the layer, position and unit that it has."""
    sites = [item.site for item in outcome.swept] or [item.site for item in request.fixed]
    words = [", ".join(map(str, sites)) or "no intervention"]
    if outcome.swept:
        item, swept = outcome.swept[0], outcome.grid.swept
        words += [f"layer {item.layers[layer]}"] if "layer" in swept else []
        words += [f"position {item.positions[base][position]}"] if "position" in swept else []
        words += [f"unit {item.units[unit]}"] if "unit" in swept and item.units is not None else []
    return " ".join([*words, f"in prompt {base} ({request.bases[base].title()})"])
