"""Counterfactuals as columns: which branch writes what, where, and where its values come from.

A sweep is tens of thousands of branches, so they are kept as arrays and never as one object each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.program import Step
from nsp.engine.slots import BOUNDARY, Slot
from nsp.interventions import Intervention
from nsp.sites import component

if TYPE_CHECKING:
    from nsp.engine.lowering import Resolved
    from nsp.engine.readout import Measure
    from nsp.engine.trunk import Trunk

Ints = npt.NDArray[np.int64]
_NOWHERE = np.iinfo(np.int64).max
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
        beside: whether the values are those of runs beside the bases (`Bases.value`), so that a pass of these can take them.
    """

    values: Callable[[Slot], torch.Tensor]
    run: Ints | None = None
    position: tuple[Ints, ...] | None = None
    branch_run: Ints | None = None
    beside: bool = False

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
        return replace(
            self, branch=self.branch[mask], layer=self.layer[mask], position=self.position[mask], unit=self.unit[mask]
        )

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


@dataclass(frozen=True)
class Cells:
    """The cells of a sweep: one branch for each layer, position and unit of every base.

    Attributes:
        swept: the axes that are swept, of ``layer``, ``position``, ``unit``.
        sizes: a (layer, position, unit) triple for each base, 1 where an axis is not swept.
    """

    swept: tuple[str, ...]
    sizes: tuple[tuple[int, int, int], ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The branches of each base."""
        return tuple(map(math.prod, self.sizes))

    @cached_property
    def offsets(self) -> Ints:
        """The first branch of each base, and last the count of all."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """The (layer, position, unit) shape that holds every base."""
        layer, position, unit = np.max(self.sizes, axis=0).tolist()
        return layer, position, unit

    @cached_property
    def base(self) -> Ints:
        """The base of each branch."""
        return np.repeat(np.arange(len(self.sizes)), self.counts)

    def scatter(self, values: np.ndarray) -> np.ndarray:
        """Values with leading axis (branch) as float32 (base, layer, position, unit, ...), NaN where a base has no such cell."""
        result = np.full((len(self.sizes), *self.shape, *values.shape[1:]), np.nan, dtype=np.float32)
        for base, (low, size) in enumerate(zip(self.offsets, self.sizes, strict=False)):
            block = values[low : low + self.counts[base]].reshape(*size, *values.shape[1:])
            result[base, : size[0], : size[1], : size[2]] = block
        return result


@dataclass(eq=False)
class Bases:
    """Base prompts, what is measured on them and what runs beside them: all that branches of theirs share.

    Attributes:
        prompts: the base prompts, each with the continuation that is measured, where there is one.
        n_layers: layers of the model.
        measures: what is measured on each of them and on their branches.
        reference: the donor run's prompts, one for each base, that effects are measured from; ``reference_positions``
            where each measure reads them, (measure, base).
        donors: further prompts that run with the bases; of all, ``slots`` are kept.
        carried: writes in the runs of the bases themselves, and so in all of their branches; ``branch`` is the base.
        path, reason: which path their branches take, ``branch`` or ``plain``, and why.
        trunk: their runs, once these have been made.
    """

    prompts: Sequence[Prompt] | Sequence[Sequence[int]]
    n_layers: int
    measures: list[Measure] = field(default_factory=list)
    reference: Sequence[Prompt] | None = None
    reference_positions: list[tuple[int, ...]] | None = None
    donors: Sequence[Prompt] = ()
    slots: frozenset[Slot] = frozenset()
    carried: Sequence[Writes] = ()
    path: str = "branch"
    reason: str = ""
    trunk: Trunk | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def lengths(self) -> Ints:
        """The tokens of each base."""
        return np.fromiter(map(len, self.prompts), np.int64)

    @cached_property
    def measured(self) -> list[frozenset[int]]:
        """The positions that are measured of each base."""
        return list(map(frozenset, zip(*(measure.positions for measure in self.measures), strict=True)))

    @cached_property
    def run_ids(self) -> list[tuple[int, ...]]:
        """The token ids of every run: bases, donors and references, equal ones once; bases that carry writes come first, each."""
        every = [*self.prompts, *self.donors, *(self.reference or ())]
        ids = [prompt.token_ids if isinstance(prompt, Prompt) else tuple(prompt) for prompt in every]
        count = len(self) if self.carried else 0
        return [*ids[:count], *dict.fromkeys(ids[count:])]

    @cached_property
    def _run(self) -> dict[tuple[int, ...], int]:
        count = len(self) if self.carried else 0
        return {ids: count + number for number, ids in enumerate(self.run_ids[count:])}

    @cached_property
    def rows(self) -> Ints:
        """The run of each base."""
        return np.arange(len(self)) if self.carried else self.runs_of(self.prompts)

    def runs_of(self, prompts: Iterable[Any]) -> Ints:
        """The run of each of some prompts that run without writes."""
        return np.array([self._run[tuple(getattr(prompt, "token_ids", prompt))] for prompt in prompts], dtype=np.int64)

    def branches(self, base: Ints | None = None, writes: Sequence[Writes] = ()) -> Branches:
        """Branches of these bases, ``base`` being the base of each; by default one for each base, without writes of its own."""
        return Branches(self, np.arange(len(self)) if base is None else base, list(writes))

    def value(self, slot: Slot) -> torch.Tensor:
        """What all runs have at a slot: (run, position, width)."""
        assert self.trunk is not None, "the bases have not run yet"
        return self.trunk.recording.values[slot]


@dataclass(eq=False)
class Branches:
    """Counterfactuals of base prompts: which branch writes what, and where.

    Attributes:
        bases: the base prompts, with what is measured; ``base`` the number of each branch's base.
        writes: one `Writes` for each intervention, in the order in which they act.
        cells: how branches are laid out for people; None: one after the other.
        stated: for each of ``writes`` of a request, the intervention, its site on the model, and whether it is swept.
        whole: each branch is run to the end of its prompt with nothing pruned; else to the last measured position.
        alone: branches with the interventions alone that all branches share, whose values are the baseline then.
        streams: each branch's stream of random draws where text is generated, by default its number.
        start: the first changed position of each branch; ``join`` the first layer that it needs to run (``n_layers``:
            none); ``end`` one past the last position that is run.
        pruned: branches whose effect is exactly zero, so that nothing runs for them.
    """

    bases: Bases
    base: Ints
    writes: list[Writes]
    cells: Cells | None = None
    stated: tuple[tuple[Intervention, Resolved, bool], ...] = ()
    whole: bool = False
    alone: Branches | None = None
    streams: Ints | None = None
    end: Ints = field(init=False)
    start: Ints = field(init=False)
    join: Ints = field(init=False)
    pruned: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        bases, count = self.bases, len(self.base)
        self.whole = self.whole or not bases.measures
        ends = bases.lengths if self.whole else np.fromiter(map(max, bases.measured), np.int64) + 1
        self.end = ends[self.base]
        self.start = np.full(count, _NOWHERE)
        self.join = np.full(count, bases.n_layers)
        # A write after the last position that is run cannot reach it: attention is causal.
        self.writes = [writes.where(writes.position < self.end[writes.branch]) for writes in self.writes]
        if not self.whole:
            self.writes = [felt(writes, bases, self.base) for writes in self.writes]
        for writes in self.writes:
            np.minimum.at(self.start, writes.branch, writes.position)
            np.minimum.at(self.join, writes.branch, writes.layer)
        self.pruned = self.start == _NOWHERE
        self.start[self.pruned] = 0

    def __len__(self) -> int:
        return len(self.base)

    @property
    def live(self) -> Ints:
        """The branches that must run."""
        return np.flatnonzero(~self.pruned)

    @property
    def lengths(self) -> Ints:
        """Changed tokens of each branch (0 where it is pruned)."""
        return np.where(self.pruned, 0, self.end - self.start)

    @property
    def components(self) -> set[str]:
        """The components that are written."""
        return {writes.component for writes in (*self.writes, *self.bases.carried)}

    @cached_property
    def carried(self) -> list[Writes]:
        """The bases' own writes as they act in the branches that run, before the branches' own.

        On the branch path the trunk has them already below a branch's first layer and before its first position.
        """
        carried = []
        for writes in self.bases.carried:
            order = np.argsort(writes.branch, kind="stable")
            cuts = np.searchsorted(writes.branch[order], np.arange(len(self.bases) + 1))
            parts = [order[cuts[base] : cuts[base + 1]] for base in self.base[self.live]]
            index = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
            branch = np.repeat(self.live, [len(part) for part in parts])
            layer, position = writes.layer[index], writes.position[index]
            keep = position < self.end[branch]
            if self.bases.path == "branch":
                # What a branch starts from has the writes into the stream that its first layer receives.
                first = self.join[branch] + (writes.component == BOUNDARY)
                keep &= (layer >= first) & (position >= self.start[branch])
            index, branch = index[keep], branch[keep]
            carried.append(
                replace(writes, branch=branch, layer=layer[keep], position=position[keep], unit=writes.unit[index])
            )
        return carried

    @cached_property
    def acting(self) -> list[Writes]:
        """All writes that act in the branches, the bases' own first: a patch of the same site is what counts."""
        return [*self.carried, *self.writes]

    def with_writes(self, writes: Sequence[Writes]) -> Branches:
        """Branches of the same bases with other writes."""
        return replace(self, writes=list(writes), stated=())


def felt(writes: Writes, bases: Bases, base: Ints) -> Writes:
    """The writes less those whose effect is exactly zero, since the last layers cannot carry them to a measured position."""
    last = writes.layer >= (bases.n_layers if writes.component == BOUNDARY else bases.n_layers - 1)
    # Within the last layer only keys and values reach another position's logits.
    if not last.any() or (writes.component != BOUNDARY and component(writes.component).reaches_later):
        return writes
    at = zip(base[writes.branch], writes.position, strict=True)
    return writes.where(~last | np.array([position in bases.measured[number] for number, position in at]))
