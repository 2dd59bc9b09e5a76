"""Two models on the same prompts: the values of the one patched into the run of the other.

The *aligned* run donates, the *base* run receives, and what is measured is KL(aligned || patched base) of the
next-token distribution. The base may carry interventions of its own (`FixedInterventions`): a model against its own ablation.

Cumulative patching (a component at layers 0 to l, for every l) takes one run per component and not one per layer: after
layer l, the run patched at 0..l is the run patched at *all* layers. So that run is made once, and its residual stream
after layer l is patched into the base at layer l + 1, which the branch path starts from.

A value that equals the base's own bit for bit is not written, and a counterfactual without writes does not run: its
divergence is the base's, exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Bases, Ints, Source, Writes
from nsp.engine.budget import Budget
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.measuring import Progress
from nsp.engine.measuring import measure as run_branches
from nsp.engine.output_directions import output_directions
from nsp.engine.readout import Measure, logits_at
from nsp.engine.recording import Recording, record
from nsp.engine.runtime import MODULE, Runtime
from nsp.engine.slots import BOUNDARY, Slot, slot_of, stream_slots
from nsp.engine.token_pairing import Paired
from nsp.engine.trunk import run_bases
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


class TwoModels:
    """The runs of two models on one batch of prompts, and counterfactuals between them.

    Args:
        everywhere: measure at every shared position too, for means over positions.
        maps: (from width, to width) matrices by slot for models of other widths, see `nsp.experiments.bias_scan.model_pair`.
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
        self.own = fixed.writes(self.prompts)
        # The last position comes first; a shorter prompt's further measures repeat it.
        self.measured = [(pair.shared[-1], *(pair.shared[:-1] if everywhere else ())) for pair in self.pairs]
        wanted = {slot_of(name, layer) for name in components for layer in base.geometry.layers_of(name)}
        path = "plain" if base.branch_refusal else "branch"
        self.bases = Bases(self.prompts, base.geometry.n_layers, carried=self.own, path=path)
        self.bases.slots = frozenset(wanted | set(stream_slots(self.bases.n_layers)))
        self.bases.measures = [
            Measure(
                Metric("kl", name=f"kl_{number}", reference="base"),
                None,
                tuple(at[number if number < len(at) else 0] for at in self.measured),
                number=number,
            )
            for number in range(max(map(len, self.measured)))
        ]
        self.donor: dict[Slot, torch.Tensor] = {}
        if not self._one_run:
            self.donor, logits = self._donor_run(wanted)
            index = {place: number for number, place in enumerate(self._places(self.measured))}
            for measure in self.bases.measures:
                at = zip(self.pairs, measure.positions, strict=True)
                places = [index[row, int(pair.where[position])] for row, (pair, position) in enumerate(at)]
                measure.reference = logits[places].to(base.device)
        recording = run_bases(base, self.bases, budget).recording
        rows = torch.as_tensor(self.bases.rows)
        self.here = {slot: value[rows.to(value.device)] for slot, value in recording.values.items()}
        self.donor = self.donor or self.here

    def _recorded(self, slots: Collection[Slot], writes: Sequence[Writes] = ()) -> dict[Slot, torch.Tensor]:
        """Slots of the base run, with writes on the way."""
        return self._record(self.base, self.prompts, slots, writes=writes).values

    def _record(self, runtime: Runtime, prompts: Sequence[Prompt], slots: Collection[Slot], **options: Any) -> Recording:
        # Keys and values as in the bases' runs: what is equal in both is equal bit for bit.
        cache = self.bases.path == "branch"
        return record(runtime, prompts, slots, budget=self.budget, keep_cache=cache, stay=True, **options)

    def _places(self, measured: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """The (row, position) places of the aligned run that stand for measured positions of the base, in order."""
        rows = enumerate(zip(self.pairs, measured, strict=True))
        return sorted((row, int(pair.where[position])) for row, (pair, positions) in rows for position in positions)

    def _donor_run(self, slots: Collection[Slot]) -> tuple[dict[Slot, torch.Tensor], torch.Tensor]:
        """Slots of the aligned run at the base's positions, and its logits at the measured places."""
        readout = logits_at(self.aligned, self._places(self.measured))
        prompts = [pair.aligned for pair in self.pairs]
        recording = self._record(self.aligned, prompts, slots, readout=readout)
        assert recording.logits is not None
        if self._one_model:
            return recording.values, recording.logits
        return {slot: self._mapped(slot, self._moved(value)) for slot, value in recording.values.items()}, recording.logits

    @property
    def _one_model(self) -> bool:
        """Whether both models and their tokens are one; ``_one_run``: whether their runs are, too."""
        return self.aligned is self.base and all(pair.aligned.token_ids == pair.base.token_ids for pair in self.pairs)

    @property
    def _one_run(self) -> bool:
        return self._one_model and not self.own

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

    # --- counterfactuals --------------------------------------------------------------------------------------------

    def baseline(self) -> Divergences:
        """The unpatched base: one cell for each prompt."""
        blank = np.zeros((len(self.pairs), 1))
        kl = np.stack(run_branches(self.base, self.bases.branches(), self.budget).base, axis=-1)
        return self._divergences(kl[:, None, :], blank, blank, np.arange(len(self.pairs)))

    def scan(self, component: str, layers: Sequence[int], way: Way, progress: Progress | None = None) -> Divergences:
        """Patch a component from the aligned run at all shared positions: one cell for each layer of ``layers``.

        ``cumulative``: at layers 0 to l; ``single``: at layer l; ``together``: at all ``layers`` at once, one cell.
        """
        slots = [slot_of(component, layer) for layer in layers]
        if way == "cumulative":
            below = [layer for layer in self.base.geometry.layers_of(component) if layer <= max(layers)]
            values = self._patched_throughout([slot_of(component, layer) for layer in below])
            slots = [(BOUNDARY, layer + 1) for layer in layers]
        else:
            values = self.donor
        cells = [0] * len(slots) if way == "together" else list(range(len(slots)))
        everywhere = [range(len(prompt)) for prompt in self.prompts] if way == "cumulative" else None
        writes, base = self._patches(slots, cells, values, everywhere)
        return self._run(writes, base, max(cells) + 1, progress)

    def _patched_throughout(self, slots: Sequence[Slot]) -> dict[Slot, torch.Tensor]:
        """The residual stream of the base run with every one of ``slots`` patched."""
        writes, _ = self._patches(slots, [0] * len(slots), self.donor, None)
        if len(writes) == 0:
            return self.here
        return self._recorded(stream_slots(self.bases.n_layers), [*self.own, writes])

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
            here, there = self.here[slot], values[slot]
            if here.shape != there.shape:
                raise InputError(
                    f"{slot[0]} is {there.shape[-1]} wide in the aligned model and {here.shape[-1]} in the base; fit a map (map: linear)"
                )
            unlike.append((here != there).any(dim=-1))
        for slot, cell, mask in zip(slots, cells, self.base.fetch(unlike), strict=True):
            differs = mask.cpu().numpy()
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
        ``everywhere`` at all shared ones. One cell for each neuron.
        """
        count = self.base.geometry.d_mlp
        wanted = {("mlp_neurons", layer) for layer in layers if layer is not None}
        blank = np.full((len(self.pairs), count), np.nan)
        divergences = Divergences(blank, blank.copy() if self.everywhere else None, np.full(blank.shape, -1.0), blank.copy())
        if not wanted:
            return divergences
        here = self._recorded(wanted, self.own)
        there = here if self._one_run else self._donor_run(wanted)[0]
        for row, layer in enumerate(layers):
            if layer is None:
                continue
            slot = ("mlp_neurons", layer)
            positions = self.pairs[row].shared if everywhere else self.pairs[row].shared[-1:]
            old, new = here[slot][row, list(positions)], there[slot][row, list(positions)]
            # (neuron, position, width): what the neuron writes in the aligned model less what it writes in the base.
            change = new.transpose(0, 1)[:, :, None] * output_directions(self.aligned, "mlp_neurons", layer)[:, None, :].to(new)
            change = change - old.transpose(0, 1)[:, :, None] * output_directions(self.base, "mlp_neurons", layer)[:, None, :].to(old)
            part = self._run_neurons(row, layer, positions, change, progress)
            for whole, one in zip(_arrays(divergences), _arrays(part), strict=True):
                whole[row] = one
        return divergences

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

    def _run(self, writes: Writes, base: Ints, cells: int, progress: Progress | None) -> Divergences:
        """Run one branch for each cell; ``base`` is the prompt of each branch."""
        measured = run_branches(self.base, self.bases.branches(base, [writes]), self.budget, progress)
        shape = (-1, cells)
        kl = np.stack(measured.by_branch, axis=-1).reshape(*shape, len(self.bases.measures))
        fired, change = measured.fired_by_branch.reshape(shape), measured.change_by_branch.reshape(shape)
        return self._divergences(kl, fired, change, base[::cells])

    def _divergences(self, kl: np.ndarray, fired: np.ndarray, change: np.ndarray, rows: Ints) -> Divergences:
        """``kl`` has axes (prompt, cell, measure); ``rows`` are its prompts."""
        mean = None
        if self.everywhere:
            counts = [len(self.measured[row]) for row in rows]
            mean = np.stack([part[:, :count].mean(axis=1) for part, count in zip(kl, counts, strict=True)])
        return Divergences(kl[:, :, 0], mean, fired, change)

    def divergence_of(self, fixed: FixedInterventions) -> np.ndarray:
        """KL(aligned || base with other interventions of its own) at the last position, axis (prompt,)."""
        last = self.bases.measures[0]
        bases = Bases(self.prompts, self.bases.n_layers, [last], carried=fixed.writes(self.prompts), path="plain")
        return run_bases(self.base, bases, self.budget).values[0]


def _arrays(of: Divergences) -> list[np.ndarray]:
    return [of.last, *([] if of.mean is None else [of.mean]), of.fired, of.change]
