"""Two models on the same prompts: the values of the one patched into the run of the other.

The *aligned* run donates, the *base* run receives, and what is measured is KL(aligned || patched base) of the
next-token distribution. The base may carry interventions of its own (`FixedInterventions`): a model against its own ablation.

Cumulative patching (a component at layers 0 to l, for every l) takes one run a component and not one a layer: after
layer l, the run patched at 0..l is the run patched at *all* layers. So that run is made once, and its residual stream
after layer l is patched into the base at layer l + 1, which the branch path starts from.

A value that equals the base's own bit for bit is not written, and a counterfactual without writes does not run: its
divergence is the base's, exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from nsp.engine.branches import BranchTable, Ints, Source, Writes, drop_unfelt
from nsp.engine.budget import Budget
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.kernels import metric_values
from nsp.engine.outcome import Numbers
from nsp.engine.output_directions import output_directions
from nsp.engine.paired import Paired
from nsp.engine.readout import Measure, logits_at
from nsp.engine.recording import Recording, record
from nsp.engine.runtime import MODULE, Runtime
from nsp.engine.slots import BOUNDARY, Slot, slot_of
from nsp.engine.sweep import Progress, run_branches
from nsp.errors import InputError
from nsp.metrics import Metric

Way = Literal["cumulative", "single", "together"]


@dataclass(frozen=True, eq=False)
class Divergences:
    """KL(aligned || patched base) of some counterfactuals, in nats.

    Attributes:
        last: at the last position, axes (prompt, cell); ``mean``: over all positions that both models have, or None.
        fired: writes made (0: nothing differs, the value is the base's exactly).
        change: L2 norm of what the writes changed.
    """

    last: np.ndarray
    mean: np.ndarray | None
    fired: np.ndarray
    change: np.ndarray


class TwoRuns:
    """The two runs of one batch of prompts, and counterfactuals between them.

    Args:
        everywhere: measure at every shared position too, for means over positions.
        maps: (from width, to width) matrices by slot for models of other widths, see `nsp.experiments.widths`.
    """

    def __init__(
        self,
        aligned: Runtime,
        base: Runtime,
        pairs: Sequence[Paired],
        fixed: FixedInterventions,
        budget: Budget,
        *,
        components: Sequence[str] = (),
        everywhere: bool = False,
        maps: Mapping[Slot, torch.Tensor] | None = None,
    ) -> None:
        self.aligned, self.base, self.pairs = aligned, base, tuple(pairs)
        self.budget, self.everywhere, self.maps = budget, everywhere, maps or {}
        self.prompts = [pair.base for pair in self.pairs]
        self.layers = base.geometry.n_layers
        self.fixed = fixed
        self.own = fixed.writes(self.prompts)
        self.path = "plain" if base.branch_refusal else "branch"
        self.measured = [
            (pair.shared[-1], *(pair.shared[:-1] if everywhere else ())) for pair in self.pairs
        ]  # the last position comes first
        wanted = {
            slot_of(component, layer)
            for component in components
            for layer in base.geometry.layers_of(component)
        }
        boundaries = {(BOUNDARY, layer) for layer in range(self.layers + 1)}
        self.trunk = self._recorded(wanted | boundaries, self.own, measured=self._places(False))
        self.donor = self._donor_run(wanted)
        assert self.trunk.logits is not None
        assert self.donor.logits is not None
        self.reference = self._by_measure(self.donor.logits, True)
        values = [
            metric_values("kl", logits, None, reference)
            for logits, reference in zip(self._by_measure(self.trunk.logits, False), self.reference, strict=True)
        ]
        self.base_kl = torch.stack(values, dim=1).cpu().numpy()  # (prompt, measure)

    def _recorded(
        self,
        slots: Collection[Slot],
        writes: Sequence[Writes] = (),
        *,
        of_aligned: bool = False,
        measured: Sequence[tuple[int, int]] = (),
    ) -> Recording:
        """One of the two runs: slots, logits at the measured places, and what branches start from."""
        runtime = self.aligned if of_aligned else self.base
        prompts = [pair.aligned if of_aligned else pair.base for pair in self.pairs]
        return record(
            runtime, prompts, slots, writes=writes, readout=logits_at(runtime, measured) if measured else None,
            keep_cache=self.path == "branch", max_tokens=0, stay=True,
        )  # fmt: skip

    def _donor_run(self, slots: set[Slot]) -> Recording:
        """The aligned run, its values at the base's positions."""
        same = self.aligned is self.base and all(pair.aligned.token_ids == pair.base.token_ids for pair in self.pairs)
        if same and not self.own:
            return self.trunk
        made = self._recorded(slots, of_aligned=True, measured=self._places(True))
        made.keys, made.cached_values = [], []
        if not same:
            made.values = {slot: self._mapped(slot, self._moved(value)) for slot, value in made.values.items()}
        return made

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        """(prompt, aligned position, width) as (prompt, base position, width)."""
        length = max(len(prompt) for prompt in self.prompts)
        at = torch.zeros(len(self.pairs), length, dtype=torch.long)
        for row, pair in enumerate(self.pairs):
            at[row, : len(pair.where)] = torch.as_tensor(np.maximum(pair.where, 0))
        rows = torch.arange(len(self.pairs))[:, None]
        return value[rows.to(value.device), at.to(value.device)].to(self.base.device)

    def _mapped(self, slot: Slot, value: torch.Tensor) -> torch.Tensor:
        if slot not in self.maps:
            return value
        matrix = self.maps[slot].to(value)
        return value @ matrix[:-1] + matrix[-1]

    def _places(self, aligned: bool) -> list[tuple[int, int]]:
        found = [
            (row, int(pair.where[position]) if aligned else position)
            for row, (pair, positions) in enumerate(zip(self.pairs, self.measured, strict=True))
            for position in positions
        ]
        return sorted(found)

    def _by_measure(self, logits: torch.Tensor, aligned: bool) -> list[torch.Tensor]:
        """Logits of the run as one (prompt, token) tensor a measure; shorter prompts repeat their last position."""
        index = {place: number for number, place in enumerate(self._places(aligned))}
        count = max(map(len, self.measured))
        found = []
        for measure in range(count):
            rows = []
            for row, pair in enumerate(self.pairs):
                position = self.measured[row][measure if measure < len(self.measured[row]) else 0]
                rows.append(index[(row, int(pair.where[position]) if aligned else position)])
            found.append(logits[rows].to(self.base.device))
        return found

    @cached_property
    def _measures(self) -> list[Measure]:
        count = max(map(len, self.measured))
        return [
            Measure(
                Metric("kl", name=f"kl_{number}"),
                None,
                tuple(at[number if number < len(at) else 0] for at in self.measured),
                self.reference[number],
            )
            for number in range(count)
        ]

    # --- counterfactuals --------------------------------------------------------------------------------------------

    def baseline(self) -> Divergences:
        """The unpatched base: one cell a prompt."""
        blank = np.zeros((len(self.pairs), 1))
        return self._divergences(self.base_kl[:, None, :], blank, blank, np.arange(len(self.pairs)))

    def scan(self, component: str, layers: Sequence[int], way: Way, progress: Progress | None = None) -> Divergences:
        """Patch a component from the aligned run at all shared positions: one cell a layer of ``layers``.

        ``cumulative``: at layers 0 to l; ``single``: at layer l; ``together``: at all ``layers`` at once, one cell.
        """
        slots = [slot_of(component, layer) for layer in layers]
        if way == "cumulative":
            below = [layer for layer in self.base.geometry.layers_of(component) if layer <= max(layers)]
            values = self._patched_throughout([slot_of(component, layer) for layer in below])
            slots = [(BOUNDARY, layer + 1) for layer in layers]
        else:
            values = dict(self.donor.values)
        cells = [0] * len(slots) if way == "together" else list(range(len(slots)))
        everywhere = [range(len(prompt)) for prompt in self.prompts] if way == "cumulative" else None
        writes, base = self._patches(slots, cells, values, everywhere)
        return self._run(writes, base, max(cells) + 1, progress)

    def _patched_throughout(self, slots: Sequence[Slot]) -> dict[Slot, torch.Tensor]:
        """The residual stream of the base run with every one of ``slots`` patched."""
        writes, _ = self._patches(slots, [0] * len(slots), dict(self.donor.values), None)
        boundaries = [(BOUNDARY, layer) for layer in range(self.layers + 1)]
        if len(writes) == 0:
            return {slot: self.trunk.values[slot] for slot in boundaries}
        return self._recorded(boundaries, [*self.own, writes]).values

    def _patches(
        self,
        slots: Sequence[Slot],
        cells: Sequence[int],
        values: Mapping[Slot, torch.Tensor],
        positions: Sequence[Sequence[int]] | None,
    ) -> tuple[Writes, Ints]:
        """Writes that set slots of one component to ``values`` where these differ from the base's; the base of each
        branch. Branch ``prompt * cells + cell``."""
        count = max(cells) + 1
        columns: dict[str, list[Ints]] = {"branch": [], "layer": [], "position": []}
        unlike = []
        for slot in slots:
            here, there = self.trunk.values[slot], values[slot]
            if here.shape != there.shape:
                raise InputError(
                    f"{slot[0]} is {there.shape[-1]} wide in the aligned model and {here.shape[-1]} in the base; fit a map (map: linear)"
                )
            unlike.append((here != there).any(dim=-1))
        for slot, cell, found in zip(slots, cells, self.base.fetch(unlike), strict=True):
            differs = found.cpu().numpy()
            for row, pair in enumerate(self.pairs):
                chosen = np.asarray(pair.shared if positions is None else positions[row], dtype=np.int64)
                chosen = chosen[differs[row, chosen]]
                columns["branch"].append(np.full(len(chosen), row * count + cell))
                columns["layer"].append(np.full(len(chosen), slot[1]))
                columns["position"].append(chosen)
        joined = {name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()}
        base = np.repeat(np.arange(len(self.pairs)), count)
        # The donor's run is the prompt's row.
        source = Source(lambda slot: values[slot], np.arange(len(self.pairs)))
        unit = np.zeros_like(joined["branch"])
        return Writes(slots[0][0], "set", 1, joined["branch"], joined["layer"], joined["position"], unit, source), base

    def neurons(
        self, layers: Sequence[int | None], *, everywhere: bool = False, progress: Progress | None = None
    ) -> Divergences:
        """Patch each MLP neuron of one layer alone, ``layers[i]`` for prompt i (None: nothing, NaN).

        A neuron is what it writes: its activation times its column of the down projection, each model with its own.
        Where both models have the same column, that is patching its activation. At the last position, or
        ``everywhere`` at all shared ones. One cell a neuron.
        """
        count = self.base.geometry.d_mlp
        wanted = {("mlp_neurons", layer) for layer in layers if layer is not None}
        blank = np.full((len(self.pairs), count), np.nan)
        found = Divergences(blank, blank.copy() if self.everywhere else None, np.full(blank.shape, -1.0), blank.copy())
        if not wanted:
            return found
        here = self._recorded(wanted, self.own)
        there = self._donor_run(wanted) if self.donor is not self.trunk else here
        for row, layer in enumerate(layers):
            if layer is None:
                continue
            slot = ("mlp_neurons", layer)
            positions = self.pairs[row].shared if everywhere else self.pairs[row].shared[-1:]
            old, new = here.values[slot][row, list(positions)], there.values[slot][row, list(positions)]
            # (neuron, position, width): what the neuron writes in the aligned model less what it writes in the base.
            change = new.transpose(0, 1)[:, :, None] * output_directions(self.aligned, "mlp_neurons", layer)[:, None, :].to(new)
            change = change - old.transpose(0, 1)[:, :, None] * output_directions(self.base, "mlp_neurons", layer)[:, None, :].to(old)
            part = self._run_neurons(row, layer, positions, change, progress)
            for whole, one in zip(_arrays(found), _arrays(part), strict=True):
                whole[row] = one
        return found

    def _run_neurons(
        self, row: int, layer: int, positions: Sequence[int], change: torch.Tensor, progress: Progress | None
    ) -> Divergences:
        where = self.base.geometry.where("mlp_neurons")
        component = f"{MODULE}{self.base.geometry.table.layers}.{layer}.{where.module}"
        moved = (change != 0).any(dim=-1).cpu().numpy()  # (neuron, position)
        branch, place = np.nonzero(moved)
        # Values by branch, at the base's own positions.
        length = max(positions) + 1
        full = change.new_zeros(len(change), length if len(positions) > 1 else 1, change.shape[-1])
        full[:, list(positions) if len(positions) > 1 else [0]] = change
        source = Source(lambda _slot: full, branch_run=np.arange(len(change)))
        at = np.asarray(positions, dtype=np.int64)[place]
        zero = np.zeros_like(branch)
        writes = Writes(component, "add", 1, branch, zero + layer, at, zero, source)
        return self._run(writes, np.full(len(change), row), len(change), progress)

    def _run(self, moving: Writes, base: Ints, cells: int, progress: Progress | None) -> Divergences:
        """Run one branch a cell; ``base`` is the prompt of each branch."""
        end = np.array([max(positions) + 1 for positions in self.measured])[base]
        measured = [frozenset(positions) for positions in self.measured]
        table = BranchTable(base, end, self.layers, [drop_unfelt(moving, self.layers, measured, base)])
        moved = self._with_own(table)
        values = [self.base_kl[:, number] for number in range(len(self._measures))]
        numbers = Numbers(table, self._measures, values)
        run_branches(self.base, numbers, self.trunk, self.budget, self.path, progress)
        shape = (-1, cells)
        kl = numbers.values.T.reshape(*shape, len(self._measures))
        fired, change = numbers.fired[moved].reshape(shape), np.sqrt(numbers.squared[moved]).reshape(shape)
        return self._divergences(kl, fired, change, base[::cells])

    def _with_own(self, table: BranchTable) -> int:
        """Put the base's own interventions into every branch that runs; returns the number of the moving writes.

        They come first, so that a patch of the same site is what stands. On the branch path the trunk has them below a
        branch's first layer and before its first position.
        """
        own = []
        for writes in self.own:
            parts = [np.flatnonzero(writes.branch == row) for row in range(len(self.pairs))]
            chosen = [parts[row] for row in table.base[table.live]]
            if not chosen:
                continue
            index = np.concatenate(chosen)
            branch = np.repeat(table.live, [len(part) for part in chosen])
            layer, position = writes.layer[index], writes.position[index]
            keep = position < table.end[branch]
            if self.path == "branch":
                keep &= (layer >= table.join[branch]) & (position >= table.start[branch])
            own.append(
                Writes(
                    writes.component, writes.kind, writes.rows, branch[keep], layer[keep], position[keep],
                    writes.unit[index][keep], writes.source, writes.factor, writes.function, writes.name,
                )
            )  # fmt: skip
        table.writes = [*own, *table.writes]
        return len(own)

    def _divergences(self, kl: np.ndarray, fired: np.ndarray, change: np.ndarray, rows: Ints) -> Divergences:
        """``kl`` has axes (prompt, cell, measure); ``rows`` are its prompts."""
        mean = None
        if self.everywhere:
            counts = [len(self.measured[row]) for row in rows]
            mean = np.stack([part[:, :count].mean(axis=1) for part, count in zip(kl, counts, strict=True)])
        return Divergences(kl[:, :, 0], mean, fired, change)

    def divergence_of(self, fixed: FixedInterventions) -> np.ndarray:
        """KL(aligned || base with other interventions of its own) at the last position, axis (prompt,)."""
        places = [(row, positions[0]) for row, positions in enumerate(self.measured)]
        made = self._recorded((), fixed.writes(self.prompts), measured=places)
        assert made.logits is not None
        return np.asarray(metric_values("kl", made.logits, None, self.reference[0]).cpu().numpy())


def _arrays(found: Divergences) -> list[np.ndarray]:
    return [found.last, *([] if found.mean is None else [found.mean]), found.fired, found.change]
