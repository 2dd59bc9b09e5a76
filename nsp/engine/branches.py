"""Counterfactuals as columns: which branch writes what, where, and where its values come from.

A sweep is tens of thousands of branches, so they are kept as arrays and never as one object each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from nsp.engine.program import Step
from nsp.engine.slots import BOUNDARY, Slot
from nsp.sites import component

Ints = npt.NDArray[np.int64]
Held = Callable[[Ints, Ints], tuple[Ints, Ints]]
"""(source run, position) -> (row, column) of a pass that makes the values it writes."""


@dataclass(frozen=True, eq=False)
class Source:
    """Where the values of one intervention's writes come from.

    Attributes:
        values: slot -> tensor with axes (source run, position, width); an axis of size 1 serves every run or position.
            For ``pattern``: (source run, head, position, key position).
        run: the source run of each base, or None where there is one for all; ``branch_run`` that of each branch,
            where branches of one base differ in it.
        position: for each base, base position -> source position; None where positions are the base's own.
    """

    values: Callable[[Slot], torch.Tensor]
    run: Ints | None = None
    position: tuple[Ints, ...] | None = None
    branch_run: Ints | None = None

    def gather(self, slot: Slot, branch: Ints, base: Ints, position: Ints, unit: Ints, rows: int) -> torch.Tensor:
        """The values of the given writes: (write, unit width), or (write, key position) for the pattern."""
        values = self.values(slot)
        run = np.zeros_like(base)
        if values.shape[0] > 1 and self.branch_run is not None:
            run = self.branch_run[branch]
        elif values.shape[0] > 1 and self.run is not None:
            run = self.run[base]
        place = self.place(base, position)
        device = values.device
        at_run = torch.as_tensor(run, device=device)
        at_unit = torch.as_tensor(unit, device=device)
        if slot[0] == "pattern":
            return values[at_run, at_unit, torch.as_tensor(place, device=device)]
        if values.shape[1] == 1:
            place = np.zeros_like(place)
        view = values.reshape(values.shape[0], values.shape[1], rows, -1)
        return view[at_run, torch.as_tensor(place, device=device), at_unit]

    def place(self, base: Ints, position: Ints) -> Ints:
        """The source's position of each write."""
        if self.position is None:
            return position
        return np.array([self.position[b][p] for b, p in zip(base, position, strict=True)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Writes:
    """All writes of one intervention, one array element each.

    Attributes:
        component, kind, rows: what is written, how (see `nsp.engine.program.Step`), and the unit rows of its tensor.
        branch, layer, position, unit: integer arrays with axis (write); ``layer`` counts boundaries for the
            residual stream.
        source: the values to set or add; None for ``scale`` by ``factor`` and for ``apply``.
    """

    component: str  # BOUNDARY for resid_pre, resid_post and embed
    kind: str
    rows: int
    branch: Ints
    layer: Ints
    position: Ints
    unit: Ints
    source: Source | None = None
    factor: float = 1.0
    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    name: str = ""

    def __len__(self) -> int:
        return len(self.branch)

    def where(self, mask: npt.NDArray[np.bool_]) -> Writes:
        """The writes that ``mask`` keeps."""
        return Writes(
            self.component, self.kind, self.rows, self.branch[mask], self.layer[mask], self.position[mask],
            self.unit[mask], self.source, self.factor, self.function, self.name,
        )  # fmt: skip

    def step(
        self, chosen: Ints, base: Ints, batch: Ints, column: Ints, device: torch.device, held: Held | None = None
    ) -> Step:
        """One program step of the writes ``chosen`` (all in one layer), at the given rows and columns of a pass.

        ``held`` says where the pass itself makes the source's values: they are taken there then.
        """
        unit, layer = self.unit[chosen], int(self.layer[chosen[0]])
        step: Step = {
            "kind": self.kind,
            "batch": torch.as_tensor(batch, device=device),
            "column": torch.as_tensor(column, device=device),
            "unit": torch.as_tensor(unit, device=device),
            "rows": self.rows,
        }
        if held is not None:
            assert self.source is not None
            assert self.source.run is not None
            row, at = held(self.source.run[base], self.source.place(base, self.position[chosen]))
            step["taken"] = (torch.as_tensor(row, device=device), torch.as_tensor(at, device=device))
        elif self.source is not None:
            slot = (self.component, layer)
            operand = self.source.gather(slot, self.branch[chosen], base, self.position[chosen], unit, self.rows)
            step["operand"] = operand if self.factor == 1.0 else operand * self.factor
        elif self.function is not None:
            step["function"] = self.function
            step["name"] = self.name
            keys = np.stack([self.branch[chosen], unit], axis=1)
            _, group = np.unique(keys, axis=0, return_inverse=True)
            order = np.argsort(group.reshape(-1), kind="stable")
            cuts = np.cumsum(np.bincount(group.reshape(-1)))[:-1]
            step["groups"] = [torch.as_tensor(part, device=device) for part in np.split(order, cuts)]
        else:
            step["operand"] = torch.tensor([self.factor], dtype=torch.float32, device=device)
        return step


@dataclass(eq=False)
class BranchTable:
    """Every branch of a sweep or trace.

    Attributes:
        base: the base prompt of each branch; ``start`` its first changed position; ``join`` the first layer that
            it needs to run (``n_layers``: none); ``end`` one past the last position that is measured.
        writes: one `Writes` an intervention, in the order in which they were stated.
        pruned: branches whose effect is exactly zero, so that nothing runs for them.
    """

    base: Ints
    end: Ints
    n_layers: int
    writes: list[Writes]
    start: Ints = field(init=False)
    join: Ints = field(init=False)
    pruned: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.base)
        self.start = np.full(count, np.iinfo(np.int64).max)
        self.join = np.full(count, self.n_layers)
        # A write after the last measured position cannot reach it: attention is causal.
        self.writes = [writes.where(writes.position < self.end[writes.branch]) for writes in self.writes]
        for writes in self.writes:
            np.minimum.at(self.start, writes.branch, writes.position)
            np.minimum.at(self.join, writes.branch, writes.layer)
        self.pruned = self.start == np.iinfo(np.int64).max
        self.start[self.pruned] = 0

    def __len__(self) -> int:
        return len(self.base)

    @property
    def live(self) -> Ints:
        """The branches that must run."""
        return np.flatnonzero(~self.pruned)

    def lengths(self) -> Ints:
        """Changed tokens of each branch (0 where it is pruned)."""
        return np.where(self.pruned, 0, self.end - self.start)


def drop_unfelt(writes: Writes, n_layers: int, measured: list[frozenset[int]], base: Ints) -> Writes:
    """Drop writes whose effect is exactly zero because the last layers cannot carry them to a measured position."""
    last = writes.layer >= (n_layers if writes.component == BOUNDARY else n_layers - 1)
    # Within the last layer only keys and values reach another position's logits.
    if (writes.component != BOUNDARY and component(writes.component).reaches_later) or not last.any():
        return writes
    seen = np.array([position in measured[b] for b, position in zip(base[writes.branch], writes.position, strict=True)])
    return writes.where(~last | seen)
