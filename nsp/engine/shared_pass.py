"""A sweep in one forward pass: base prompts and donors run as rows of the pass that runs their branches.

Where all branches fit one pass, a run of the bases and donors before it would read every weight once more,
for matrix products of a few rows. Here these prompts are cut into pieces of the pass's width, which join at the first
layer. A branch's row starts from what its base's pieces receive where it joins, sees the keys and values that they make in
the same layer, and a patch takes the donor's value from the donor's piece. The arithmetic is that of the branch path
(`nsp.engine.passes`), the order of the rows apart; `nsp.engine.selfcheck` compares both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from nsp.engine.branches import Branches, Ints
from nsp.engine.budget import Budget, shared_pass_bytes
from nsp.engine.forward_pass import empty_entry, pad_token, padded_ids, program_of
from nsp.engine.measured import Numbers
from nsp.engine.pack import Pass
from nsp.engine.passes import Lowered, laid_out, pass_mask, place_writes, trim_last
from nsp.engine.program import LayerEntry
from nsp.engine.readout import Measure, build_readout
from nsp.engine.runtime import Runtime
from nsp.metrics import METRICS

# What reading a layer's weights once more costs, in tokens: small prompts are bound by it, not by arithmetic.
_WEIGHTS = 8


class PiecesCache(DynamicCache):  # type: ignore[misc]  # transformers gives no types
    """Hands every row of a pass the keys and values that its base prompt's pieces make in the same layer; keeps none.

    Args:
        row, column: where the pass holds the past positions of each of its rows, both (row, past position).
    """

    def __init__(self, row: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__()
        self._row, self._column = row, column

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (row, head, past + own column, width) of the rows that are active in this layer."""
        row, column = self._row[: len(key_states)], self._column[: len(key_states)]
        keys = torch.cat([key_states.transpose(1, 2)[row, column].transpose(1, 2), key_states], dim=2)
        values = torch.cat([value_states.transpose(1, 2)[row, column].transpose(1, 2), value_states], dim=2)
        return keys, values


@dataclass(frozen=True, eq=False)
class Pieces:
    """Whole prompts cut into rows of one width.

    Attributes:
        ids, lengths: token ids (prompt, position), padded on the right, and the true lengths.
        width: columns of a row; ``first`` the first row of each prompt, and last the count of rows.
    """

    ids: torch.Tensor
    lengths: Ints
    width: int
    first: Ints

    @classmethod
    def of(cls, runtime: Runtime, prompts: Sequence[Sequence[int]], width: int) -> Pieces:
        """The pieces of distinct prompts."""
        ids, lengths = padded_ids(prompts, pad_token(runtime), runtime.device)
        counts = -(-lengths.numpy() // width)
        return cls(ids, lengths.numpy(), width, np.concatenate([[0], np.cumsum(counts)]))

    @cached_property
    def rows(self) -> int:
        return int(self.first[-1])

    @cached_property
    def prompt(self) -> Ints:
        """The prompt of each row."""
        return np.repeat(np.arange(len(self.lengths)), np.diff(self.first))

    @cached_property
    def start(self) -> Ints:
        """The position of each row's first column."""
        return (np.arange(self.rows) - self.first[self.prompt]) * self.width

    def past(self, packed: Pass) -> int:
        """The past positions that a row of these pieces, or of the pass that they run in, sees at the most."""
        return max(packed.past, int(self.start.max()))

    def at(self, prompt: Ints, position: Ints) -> tuple[Ints, Ints]:
        """Row and column of each position; one after a prompt's end is sent to its last."""
        position = np.minimum(position, self.lengths[prompt] - 1)
        return self.first[prompt] + position // self.width, position % self.width


def run(runtime: Runtime, branches: Branches, passes: Sequence[Pass | Ints], budget: Budget) -> Numbers | None:
    """Run bases, donors, references and branches in one pass, or None where that cannot be or costs more.

    ``passes`` are those that would run the branches after their bases.
    """
    if not runtime.shares_pass or len(passes) != 1 or not fits(branches):
        return None
    (packed,) = passes
    assert isinstance(packed, Pass)
    pieces = Pieces.of(runtime, branches.bases.run_ids, packed.width)
    needed = shared_pass_bytes(runtime, pieces.rows + len(packed.rows), pieces.width, pieces.past(packed))
    if needed > budget.bytes or not worthwhile(runtime, pieces, packed):
        return None
    return run_pieces(runtime, branches, pieces, packed)


def fits(branches: Branches) -> bool:
    """Whether what is measured can be had in one pass: patches from prompts, and metrics of one run's logits."""
    bases = branches.bases
    patches = all(
        writes.source is not None and writes.source.beside and writes.component != "pattern" for writes in branches.acting
    )
    metrics = bool(bases.measures) and all(_at_head_alone(measure) for measure in bases.measures)
    return bases.path == "branch" and bases.trunk is None and not branches.whole and not branches.alone and patches and metrics


def _at_head_alone(measure: Measure) -> bool:
    kind = METRICS[measure.metric.kind]
    return measure.boundary is None and not kind.reference and kind.setting != "function"


def worthwhile(runtime: Runtime, pieces: Pieces, packed: Pass) -> bool:
    """Whether one pass costs no more than the runs of the bases and the branches one after the other.

    Cut into narrow pieces a long prompt has its keys and values copied once a piece, which no read of the weights saves.
    """
    cost, n_layers = runtime.cost, runtime.geometry.n_layers
    running = sum([n_layers - row.join for row in packed.rows]) / n_layers  # rows, in the mean over layers
    together = cost.rows(1, pieces.width, pieces.past(packed)) * (pieces.rows + running)
    apart = sum([cost.rows(1, length, 0) for length in pieces.lengths.tolist()])
    apart += cost.rows(1, packed.width, packed.past) * running
    return together <= apart + _WEIGHTS * cost.per_token


def run_pieces(runtime: Runtime, branches: Branches, pieces: Pieces, packed: Pass) -> Numbers:
    """Run one pass of all pieces and all branches."""
    bases = branches.bases
    read = [(bases.rows, [measure.positions for measure in bases.measures])]
    if bases.reference is not None and bases.reference_positions is not None:
        read.append((bases.runs_of(bases.reference), bases.reference_positions))
    lowered = _lower(runtime, branches, pieces, read, packed)
    outputs = runtime.execute(lowered.program)
    # The readouts of each measure are those of the branches, then of the bases, then of the references.
    alone = [value[len(lowered.branches) :].cpu().numpy().reshape(len(read), -1) for value in outputs["metrics"]]
    base, *reference = zip(*alone, strict=True)
    numbers = Numbers(branches, base, *reference)
    numbers.add(lowered, outputs)
    return numbers


def _lower(
    runtime: Runtime,
    branches: Branches,
    pieces: Pieces,
    read: Sequence[tuple[Ints, Sequence[Sequence[int]]]],
    packed: Pass,
) -> Lowered:
    """One pass of all pieces and all branches.

    Args:
        read: the prompts (of ``pieces``) that are measured without interventions, one for each base, and the position of
            each measure in them.
    """
    device, n_layers, past = runtime.device, runtime.geometry.n_layers, pieces.past(packed)
    laid = laid_out(branches, packed)
    chosen, joins, placed = laid.branches, laid.joins, laid.places(branches, above=pieces.rows)

    # The pieces come first, each its own owner.
    columns = pieces.start[:, None] + np.arange(pieces.width)[None, :]
    inside = columns < pieces.lengths[pieces.prompt][:, None]
    owned = np.where(inside, len(branches) + np.arange(pieces.rows)[:, None], -1)
    started = np.where(inside, pieces.start[:, None], 0)
    positions = np.concatenate([np.where(inside, columns, 0), laid.positions])
    owner, begin = np.concatenate([owned, laid.owner]), np.concatenate([started, laid.begin])
    of_row = np.concatenate([pieces.prompt, branches.bases.rows[laid.bases]])
    held, held_column = pieces.at(of_row[:, None], np.arange(past)[None, :])
    cache = PiecesCache(torch.as_tensor(held, device=device), torch.as_tensor(held_column, device=device))
    at = torch.as_tensor(positions, device=device)
    inputs: dict[str, Any] = {
        "input_ids": pieces.ids[torch.as_tensor(of_row, device=device)[:, None], at],
        "attention_mask": pass_mask(runtime, owner, begin, positions, past),
        "position_ids": at,
        "past_key_values": cache,
        "use_cache": True,
    }

    active = (pieces.rows + np.searchsorted(joins, np.arange(n_layers + 1), side="right")).tolist()
    entries: list[LayerEntry] = [empty_entry(runtime, layer, active[layer]) for layer in range(n_layers + 1)]
    for layer in np.unique(joins).tolist():
        if layer:
            new = pieces.rows + np.flatnonzero(joins == layer)
            row, column = pieces.at(of_row[new][:, None], positions[new])
            entries[layer]["copied"] = torch.as_tensor(row, device=device), torch.as_tensor(column, device=device)
    norm_branches = place_writes(runtime, branches, entries, chosen, placed, past, pieces.at)

    batch, readout_column = [], []
    for number, measure in enumerate(branches.bases.measures):
        here = np.maximum(np.asarray(measure.positions)[branches.base[chosen]], branches.start[chosen])
        places = [(placed.row[chosen], placed.column(chosen, here))]
        places += [pieces.at(of, np.asarray(where[number])) for of, where in read]
        batch.append(torch.as_tensor(np.concatenate([rows for rows, _ in places])))
        readout_column.append(torch.as_tensor(np.concatenate([at for _, at in places])))
    every = np.arange(len(branches.bases))
    bases = torch.as_tensor(np.concatenate([branches.base[chosen], *([every] * len(read))]))
    readout = build_readout(runtime, branches.bases.measures, bases, batch, readout_column)
    program = program_of(runtime, inputs, entries, readout)
    trim_last(runtime, program, branches)
    return Lowered(program, chosen, norm_branches, [])
