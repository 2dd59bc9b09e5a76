"""The runs of path patching: what senders change, what receivers make of it, and one branch for each path.

1. *Change*: what a sender adds to the residual stream in the donor run less what it adds in the base run. For a head, the
   attention output that its layer makes with this one head's ``z`` taken from the donor, less the base's.
2. *Receive*: the base's state that a receiver reads, plus the change, goes through the receiver's own norm and
   projection (or MLP). With everything between frozen, that is what the receiver would have computed.
3. *Run on*: one branch of the base run a path, with the receiver's value put in its place and all that follows running
   as usual.

Steps 1 and 2 act token by token, so the states of all senders, prompts and positions are the tokens of a few passes, a
few a layer; no pass belongs to one path alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.datasets.alignment import align
from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Bases, Branches, Ints, Source, Writes
from nsp.engine.engine import Engine
from nsp.engine.measuring import Progress
from nsp.engine.recording import Recording
from nsp.engine.request import Request
from nsp.engine.slots import BOUNDARY, Slot
from nsp.engine.tokenwise import through_layer
from nsp.errors import NspError
from nsp.experiments.path_patching.nodes import Node, grouped, input_slot, reaches
from nsp.metrics import Metric
from nsp.sites import Selection

# How far a state that is recomputed unchanged may lie from the one that was captured, relative to the largest.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


@dataclass(frozen=True, eq=False)
class Cells:
    """The (prompt, position) cells at which paths run; all arrays have axis (cell).

    Attributes:
        base: the pair; ``position`` the base's position, ``donor`` the donor's that stands for it.
    """

    base: Ints
    position: Ints
    donor: Ints

    def __len__(self) -> int:
        return len(self.base)


def cells_of(bases: Sequence[Prompt], donors: Sequence[Prompt], positions: Selection | None) -> Cells:
    """The selected positions of every pair, less those before which both prompts are the same: nothing differs there."""
    columns: list[tuple[int, int, int]] = []
    for number, (base, donor) in enumerate(zip(bases, donors, strict=True)):
        alignment = align(base, donor, positions)
        there = dict(alignment.base_to_donor)
        chosen = [position for position in base.positions(positions) if position >= alignment.shared_prefix]
        columns += [(number, position, there[position]) for position in sorted(set(chosen))]
    table = np.array(columns, dtype=np.int64).reshape(-1, 3)
    return Cells(table[:, 0], table[:, 1], table[:, 2])


@dataclass(frozen=True, eq=False)
class PathValues:
    """Values of paths, axes (metric, pair, sender, receiver); NaN where a sender does not reach a receiver."""

    values: np.ndarray
    change: np.ndarray  # (pair, sender, receiver)
    fired: np.ndarray


class Paths:
    """The paths of a block of pairs.

    Attributes:
        base, donor: the metrics on the runs as they are, axes (metric, pair).
        change: what each sender changes in the residual stream, (sender, cell, width), float32.
    """

    def __init__(
        self,
        engine: Engine,
        bases: Sequence[Prompt],
        donors: Sequence[Prompt],
        metrics: Sequence[Metric],
        tokens: Sequence[torch.Tensor | None],
        senders: Sequence[Node],
        positions: Selection | None,
    ) -> None:
        self.engine, self.runtime, self.bases = engine, engine.runtime, list(bases)
        self.senders = tuple(senders)
        self.cells = cells_of(bases, donors, positions)
        self._bases = measured_bases(engine, bases, donors, metrics, tokens)
        runs = engine.measure(self._bases.branches())
        assert runs.reference is not None
        self.base, self.donor = np.stack(runs.base), np.stack(runs.reference)
        self._length = max(map(len, bases))
        self.change = self._changes(donors)

    # --- what senders change ----------------------------------------------------------------------------------------

    def _at(self, kept: Recording, slot: Slot, *, donor: bool = False) -> torch.Tensor:
        """A captured site's values at the cells, (cell, width)."""
        rows, places = self.cells.base, self.cells.donor if donor else self.cells.position
        value = kept.values[slot]
        return value[torch.as_tensor(rows, device=value.device), torch.as_tensor(places, device=value.device)]

    def _changes(self, donors: Sequence[Prompt]) -> torch.Tensor:
        slots = {(BOUNDARY, 0) if node.component == "embed" else (node.component, node.layer) for node in self.senders}
        here, there = self.engine.record(self.bases, slots), self.engine.record(donors, slots)
        width = self.runtime.geometry.d_model
        found = torch.zeros(len(self.senders), len(self.cells), width)
        if len(self.cells) == 0:
            return found
        for slot in slots:
            old, new = self._at(here, slot), self._at(there, slot, donor=True)
            mine = [number for number, node in enumerate(self.senders) if slot == _slot_of(node)]
            if slot[0] == "z":
                found[mine] = self._head_changes(slot[1], [self.senders[number] for number in mine], old, new)
            else:
                found[mine] = (new.float() - old.float()).cpu()
        return found

    def _head_changes(self, layer: int, heads: Sequence[Node], old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """What the attention output gains from each head's ``z`` of the donor, (head, cell, width)."""
        states = [old]
        for node in heads:
            mixed = old.reshape(len(old), node.rows, -1).clone()
            rows = list(node.unit_rows)
            mixed[:, rows] = new.reshape(len(new), node.rows, -1)[:, rows]
            states.append(mixed.reshape(old.shape))
        made = through_layer(self.runtime, layer, "z", torch.cat(states), ["attn_out"], self.engine.budget)["attn_out"]
        parts = made.reshape(len(states), len(old), -1)
        return (parts[1:] - parts[:1]).cpu()

    # --- what receivers make of it ----------------------------------------------------------------------------------

    def _received(self, group: Sequence[Node], kept: Recording) -> dict[str, torch.Tensor]:
        """The values that receivers of one state compute for every sender that reaches them.

        Returns component -> (pair x sender, position, tensor width); rows of senders that do not reach them stay zero.
        """
        layer, slot = group[0].layer, input_slot(self.runtime.geometry, group[0])
        names = sorted({node.component for node in group})
        reaching = [number for number, node in enumerate(self.senders) if reaches(node, group[0])]
        state = self._at(kept, slot).float()
        states = torch.cat([state, *(state + self.change[number].to(state.device) for number in reaching)])
        made = through_layer(self.runtime, layer, slot[0], states, names, self.engine.budget)
        found = {}
        for name, value in made.items():
            parts = value.reshape(len(reaching) + 1, len(self.cells), -1)
            self._check(name, layer, parts[0], self._at(kept, (name, layer)))
            found[name] = self._spread(parts[1:], reaching)
        return found

    def _check(self, name: str, layer: int, made: torch.Tensor, captured: torch.Tensor) -> None:
        """A state that nothing changed must give what the base run had."""
        off, size = float((made - captured.float()).abs().max()), float(captured.float().abs().max())
        if not off <= _TOLERANCE.get(self.runtime.dtype, 0.05) * max(size, 1e-3):
            raise NspError(
                f"{name} of layer {layer}, computed from the captured residual stream, is off by {off:.2g} (largest value {size:.2g}): "
                "this model's layer does not compute it from one token alone, so paths cannot be patched exactly"
            )

    def _spread(self, values: torch.Tensor, senders: Sequence[int]) -> torch.Tensor:
        """(sender, cell, width) of some senders as (pair x sender, position, width), zero elsewhere."""
        full = values.new_zeros(len(self.bases), len(self.senders), self._length, values.shape[-1])
        rows, places = torch.as_tensor(self.cells.base), torch.as_tensor(self.cells.position)
        for number, sender in enumerate(senders):
            full[rows, sender, places] = values[number]
        return full.reshape(-1, self._length, values.shape[-1])

    # --- branches ---------------------------------------------------------------------------------------------------

    def run(self, receivers: Sequence[Node], progress: Progress | None = None) -> PathValues:
        """Every path to the given receivers."""
        shape = (len(self.bases), len(self.senders), len(receivers))
        values = np.full((len(self.base), *shape), np.nan, dtype=np.float32)
        change = np.full(shape, np.nan, dtype=np.float32)
        fired = np.full(shape, -1, dtype=np.int64)
        kept = self.engine.record(self.bases, self._receiver_slots(receivers))
        for numbers in grouped(receivers):
            group = [receivers[number] for number in numbers]
            if len(self.cells) == 0 or not any(reaches(sender, group[0]) for sender in self.senders):
                sources: dict[str, torch.Tensor] = {}
            elif group[0].component == "logits":
                sources = {"logits": self._spread(self.change, range(len(self.senders)))}
            else:
                sources = self._received(group, kept)
            there = {name: value.to(self.runtime.device) for name, value in sources.items()}
            owner, branches = path_branches(self._bases, self.cells, self.senders, group, there)
            if len(owner) == 0:
                continue
            measured = self.engine.measure(branches, progress=progress)
            at = (owner[:, 0], owner[:, 1], np.asarray(numbers)[owner[:, 2]])
            for metric, metric_values in enumerate(measured.by_branch):
                values[metric][at] = metric_values
            change[at], fired[at] = measured.change_by_branch, measured.fired_by_branch
        return PathValues(values, change, fired)

    def _receiver_slots(self, receivers: Sequence[Node]) -> set[Slot]:
        """What receivers read, and what they make of it in the base run."""
        inner = [node for node in receivers if node.component != "logits"]
        return {input_slot(self.runtime.geometry, node) for node in inner} | {(n.component, n.layer) for n in inner}


def _slot_of(node: Node) -> Slot:
    return (BOUNDARY, 0) if node.component == "embed" else (node.component, node.layer)


def measured_bases(
    engine: Engine,
    bases: Sequence[Prompt],
    donors: Sequence[Prompt],
    metrics: Sequence[Metric],
    tokens: Sequence[torch.Tensor | None],
) -> Bases:
    """The base prompts with what is measured on them and on the donor's, from which the branches of paths start."""
    request = Request(tuple(bases), (), tuple(metrics), tuple(tokens), reference=tuple(donors))
    return engine.plan(request, further=True).bases


def path_branches(
    bases: Bases, cells: Cells, senders: Sequence[Node], group: Sequence[Node], sources: dict[str, torch.Tensor]
) -> tuple[Ints, Branches]:
    """One branch for each pair and path to the receivers of one group.

    Returns (pair, sender, receiver) of each branch, (branch, 3), and the branches. ``sources``: component -> what is
    written, (pair x sender, position, width); branches for an estimate are never run and need none.
    """
    pairs = len(bases)
    edges = [(s, r) for s, sender in enumerate(senders) for r, receiver in enumerate(group) if reaches(sender, receiver)]
    index = np.array(edges, dtype=np.int64).reshape(-1, 2)
    owner = np.concatenate(
        [np.repeat(np.arange(pairs), len(index))[:, None], np.tile(index, (pairs, 1))], axis=1
    )  # (branch, 3)
    base = owner[:, 0]
    per_base = [cells.position[cells.base == row] for row in range(pairs)]
    stated = []
    # A head and the whole component split their tensor in different ways, so they are different writes.
    for name, rows in sorted({(node.component, node.rows) for node in group}):
        branches, places, units = [], [], []
        for branch, (pair, _, receiver) in enumerate(owner):
            node = group[receiver]
            if (node.component, node.rows) != (name, rows):
                continue
            at = per_base[pair]
            branches.append(np.full(len(at) * len(node.unit_rows), branch))
            places.append(np.repeat(at, len(node.unit_rows)))
            units.append(np.tile(np.asarray(node.unit_rows, dtype=np.int64), len(at)))
        branch_of, place_of, unit_of = (_joined(part) for part in (branches, places, units))
        to_logits = name == "logits"
        writes = Writes(
            BOUNDARY if to_logits else name,
            "add" if to_logits else "set",
            rows,
            branch_of,
            np.full(len(branch_of), group[0].layer, dtype=np.int64),
            place_of,
            unit_of,
            _source(sources.get(name), base * len(senders) + owner[:, 1]),
            name=name,
        )
        stated.append(writes)
    return owner, bases.branches(base, stated)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)


def _source(values: torch.Tensor | None, run: Ints) -> Source:
    held = torch.zeros(1, 1, 1) if values is None else values
    return Source(lambda _slot: held, branch_run=run)
