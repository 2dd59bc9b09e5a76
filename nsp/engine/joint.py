"""A sweep in one forward pass: base prompts and donors run as rows of the pass that runs their branches.

Where all branches of a request fit one pass, a run of the bases and donors before it would read every weight once more,
for matrix products of a few rows. Here these prompts are cut into pieces of the pass's width, which join at the first
layer. A branch's row starts from what its base's pieces receive where it joins, sees the keys and values that they make in
the same layer, and a patch takes the donor's value from the donor's piece. The arithmetic is that of the branch path
(`nsp.engine.passes`), the order of the rows apart; `nsp.engine.selfcheck` compares both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from nsp.datasets.alignment import align
from nsp.datasets.prompts import Prompt
from nsp.engine.branches import BranchTable, Ints, Source
from nsp.engine.budget import Budget, joint_bytes
from nsp.engine.forward_pass import check_ids, empty_entry, pad_token, padded_ids
from nsp.engine.lowering import Operand, Resolved, build_table, grid_of, resolve
from nsp.engine.operands import position_maps
from nsp.engine.outcome import Outcome, Prepared, Tally
from nsp.engine.pack import Pass, pack
from nsp.engine.passes import Lowered, laid_out, pass_mask, place_writes, trim_last
from nsp.engine.program import LayerEntry, Program
from nsp.engine.readout import Measure, build_readout
from nsp.engine.recording import Recording
from nsp.engine.request import Request, check_request, continued, measured_positions, request_measures
from nsp.engine.runtime import Runtime
from nsp.engine.slots import Slot
from nsp.interventions import Patch
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
        keys, values = (
            torch.cat([states.transpose(1, 2)[row, column].transpose(1, 2), states], dim=2)
            for states in (key_states, value_states)
        )
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

    @property
    def rows(self) -> int:
        return int(self.first[-1])

    @property
    def prompt(self) -> Ints:
        """The prompt of each row."""
        return np.repeat(np.arange(len(self.lengths)), np.diff(self.first))

    @property
    def start(self) -> Ints:
        """The position of each row's first column."""
        return (np.arange(self.rows) - self.first[self.prompt]) * self.width

    def past(self, made: Pass) -> int:
        """The past positions that a row of these pieces, or of the pass that they run in, sees at the most."""
        return max(made.past, int(self.start.max()))

    def at(self, prompt: Ints, position: Ints) -> tuple[Ints, Ints]:
        """Row and column of each position; one after a prompt's end is sent to its last."""
        position = np.minimum(position, self.lengths[prompt] - 1)
        return self.first[prompt] + position // self.width, position % self.width


def run_joint(
    runtime: Runtime, request: Request, budget: Budget, reason: str, *, at_any_cost: bool = False
) -> Outcome | None:
    """Run everything that ``request`` describes in one pass, or None where that takes more than one or costs more.

    ``at_any_cost`` runs it also where passes one after the other would be quicker: to compare them.
    """
    if not runtime.joint or not _fits(request):
        return None
    check_request(runtime, request)
    measures, moved = request_measures(request)
    if any(measure.boundary is not None for measure in measures):
        return None
    whole = continued(request)
    sites = [resolve(runtime, item.site, request.bases) for item in request.swept]
    grid = grid_of(sites, request.axes, len(request.bases))
    donors = [donor.prompts for donor in whole.donors if donor is not None]
    prompts = [prompt for group in (whole.bases, *donors, whole.reference or ()) for prompt in group]
    row = {ids: number for number, ids in enumerate(dict.fromkeys(prompt.token_ids for prompt in prompts))}
    check_ids(runtime, list(row))
    resolved = [
        (item, _operand(request.bases, donor.prompts, item, given, row), True)
        for item, donor, given in zip(sites, request.donors, donors, strict=True)
        if donor is not None
    ]
    measured = measured_positions(whole, measures)
    table = build_table(
        runtime, request.bases, resolved, grid, measured, prune=True, cumulative=request.cumulative
    )
    most = budget.branch_tokens(runtime, table)
    if int(table.lengths().sum()) > most:
        return None  # without packing them: there may be very many
    passes = pack(table, runtime.cost, most)
    if len(passes) != 1:
        return None
    pieces = Pieces.of(runtime, list(row), passes[0].width)
    if joint_bytes(runtime, pieces.rows + len(passes[0].rows), pieces.width, pieces.past(passes[0])) > budget.bytes:
        return None
    if not at_any_cost and not worthwhile(runtime, pieces, passes[0]):
        return None
    places = [(_rows(row, whole.bases), [measure.positions for measure in measures])]
    if whole.reference is not None and moved is not None:
        places.append((_rows(row, whole.reference), moved))
    lowered = _lower(runtime, table, pieces, _rows(row, whole.bases), measures, places, passes[0])
    outputs = runtime.execute(lowered.program)
    values = [value.cpu().numpy() for value in outputs["metrics"]]
    live = len(lowered.branches)
    ordinary = [[value[live:].reshape(len(places), -1)[which] for value in values] for which in range(len(places))]
    nothing = Recording(pieces.ids, torch.as_tensor(pieces.lengths))
    reference = ordinary[1] if len(ordinary) > 1 else None
    tally = Tally(Prepared(request, resolved, grid, table, nothing, measures, ordinary[0], reference))
    tally.place(lowered, [value[:live] for value in values], outputs)
    return tally.outcome("branch", reason, 1)


def worthwhile(runtime: Runtime, pieces: Pieces, made: Pass) -> bool:
    """Whether one pass costs no more than the ordinary runs and the branches one after the other.

    Cut into narrow pieces a long prompt has its keys and values copied once a piece, which no read of the weights saves.
    """
    cost, n_layers = runtime.cost, runtime.geometry.n_layers
    running = sum(n_layers - row.join for row in made.rows) / n_layers  # rows, in the mean over layers
    together = cost.rows(1, pieces.width, pieces.past(made)) * (pieces.rows + running)
    apart = sum(cost.rows(1, int(length), 0) for length in pieces.lengths) + cost.rows(1, made.width, made.past) * running
    return together <= apart + _WEIGHTS * cost.per_token


def _fits(request: Request) -> bool:
    """Whether what a request asks for can be had in one pass: patches from prompts, and metrics of one run's logits."""
    patches = all(isinstance(item, Patch) and item.site.component != "pattern" for item in request.swept)
    donors = len(request.donors) == len(request.swept) and all(donor is not None for donor in request.donors)
    kinds = [METRICS[metric.kind] for metric in request.metrics]
    metrics = bool(kinds) and not any(kind.reference or kind.setting == "function" for kind in kinds)
    return bool(request.axes) and not request.fixed and not request.whole and patches and donors and metrics


def _rows(row: dict[tuple[int, ...], int], prompts: Sequence[Prompt]) -> Ints:
    return np.array([row[prompt.token_ids] for prompt in prompts], dtype=np.int64)


def _operand(
    bases: Sequence[Prompt], donors: Sequence[Prompt], item: Resolved, whole: Sequence[Prompt], row: dict[tuple[int, ...], int]
) -> Operand:
    """A patch whose values the pass itself makes: its source knows the donors' rows and positions, and no values."""
    aligned = tuple(align(base, donor, item.site.positions) for base, donor in zip(bases, donors, strict=True))
    return Operand("set", Source(_made_here, _rows(row, whole), position_maps(aligned)), alignments=aligned)


def _made_here(slot: Slot) -> torch.Tensor:
    raise AssertionError(f"the pass makes the values of {slot} itself")


def _lower(
    runtime: Runtime,
    table: BranchTable,
    pieces: Pieces,
    prompt: Ints,
    measures: Sequence[Measure],
    ordinary: Sequence[tuple[Ints, Sequence[Sequence[int]]]],
    made: Pass,
) -> Lowered:
    """One pass of all pieces and all branches; its readouts are those of the branches, then of the ordinary prompts.

    Args:
        prompt: the prompt (of ``pieces``) of each base; ``ordinary`` the prompts that are measured without interventions,
            one a base, and the position of each measure in them.
    """
    device, n_layers, past = runtime.device, runtime.geometry.n_layers, pieces.past(made)
    laid = laid_out(table, made)
    branches, joins, placed = laid.branches, laid.joins, laid.places(table, above=pieces.rows)

    # The pieces come first, each its own owner.
    columns = pieces.start[:, None] + np.arange(pieces.width)[None, :]
    inside = columns < pieces.lengths[pieces.prompt][:, None]
    owned = np.where(inside, len(table) + np.arange(pieces.rows)[:, None], -1)
    started = np.where(inside, pieces.start[:, None], 0)
    positions = np.concatenate([np.where(inside, columns, 0), laid.positions])
    owner, begin = np.concatenate([owned, laid.owner]), np.concatenate([started, laid.begin])
    of_row = np.concatenate([pieces.prompt, prompt[laid.bases]])
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

    entries: list[LayerEntry] = []
    for layer in range(n_layers + 1):
        entry = empty_entry(runtime, layer, pieces.rows + int((joins <= layer).sum()))
        new = pieces.rows + np.flatnonzero(joins == layer)
        if layer and len(new):
            copied = pieces.at(of_row[new][:, None], positions[new])
            entry["copied"] = (torch.as_tensor(copied[0], device=device), torch.as_tensor(copied[1], device=device))
        entries.append(entry)
    norm_branches = place_writes(runtime, table, entries, branches, placed, past, pieces.at)

    batch, column = [], []
    for number, measure in enumerate(measures):
        base = table.base[branches]
        here = np.maximum(np.asarray(measure.positions)[base], table.start[branches])
        read = [(placed.row[branches], placed.column(branches, here))]
        read += [pieces.at(of, np.asarray(where[number])) for of, where in ordinary]
        batch.append(torch.as_tensor(np.concatenate([one for one, _ in read])))
        column.append(torch.as_tensor(np.concatenate([one for _, one in read])))
    each = np.arange(len(prompt))
    bases = torch.as_tensor(np.concatenate([table.base[branches], *(each for _ in ordinary)]))
    program: Program = {
        "inputs": inputs,
        "batch": pieces.rows + len(made.rows),
        "start": 0,
        "skipped": [],
        "first": None,
        "layers": entries[:-1],
        "final": entries[-1],
        "readout": build_readout(runtime, measures, bases, batch, column),
    }
    trim_last(runtime, program, table)
    return Lowered(program, branches, norm_branches, [])
