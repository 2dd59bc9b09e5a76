"""Ordinary runs with interventions in them: a batch of prompts run once, whole, with writes on the way and values kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.datasets.alignment import Alignment
from nsp.datasets.prompts import Prompt
from nsp.engine.branches import BranchTable, Source, Writes
from nsp.engine.capture import BOUNDARY, Capture, Slot, capture_program, check_ids, pad_token, padded_ids, run_capture
from nsp.engine.lowering import Operand, Resolved, grid_of, resolve, write_columns
from nsp.engine.operands import make_operand
from nsp.engine.passes import Places, place_writes
from nsp.engine.program import Program
from nsp.engine.readout import readout_at
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.interventions import Intervention, Patch

Place = tuple[int, int]  # (row of the batch, position)


@dataclass(frozen=True, eq=False)
class Fixed:
    """Interventions that belong to a run whatever else is done to it: a model with some of its sites ablated.

    Attributes:
        interventions: in the order in which they act.
        operands: what each writes, found once for all prompts.
    """

    runtime: Runtime
    interventions: tuple[Intervention, ...]
    operands: tuple[Operand, ...]

    @classmethod
    def of(cls, runtime: Runtime, interventions: Iterable[Intervention], prompts: Sequence[Prompt]) -> Fixed:
        """The interventions made ready for any batch of ``prompts`` (or of shorter ones)."""
        stated = tuple(interventions)
        operands = tuple(
            make_operand(runtime, item, resolve(runtime, item.site, prompts), prompts, _no_donor) for item in stated
        )
        return cls(runtime, stated, operands)

    def writes(self, prompts: Sequence[Prompt]) -> list[Writes]:
        """The writes in a batch of prompts; ``branch`` is the prompt's row."""
        grid = grid_of([], (), len(prompts))
        return [
            write_columns(resolve(self.runtime, item.site, prompts), operand, grid, len(prompts), moving=False)
            for item, operand in zip(self.interventions, self.operands, strict=True)
        ]


def _no_donor(patch: Patch, _item: Resolved) -> tuple[Source, tuple[Alignment, ...] | None]:
    raise InputError(f"patch {patch.site}: a run's own interventions have no donor; ablate, scale or inject")


def write_into(runtime: Runtime, program: Program, writes: Sequence[Writes], lengths: Sequence[int]) -> None:
    """Put writes (``branch``: the row) into a program of whole rows whose written sites are also read."""
    rows = np.arange(len(lengths))
    table = BranchTable(rows, np.asarray(lengths, dtype=np.int64), runtime.geometry.n_layers, list(writes))
    places = Places(table, rows, rows, np.zeros(len(rows), dtype=np.int64))
    place_writes(runtime, table, [*program["layers"], program["final"]], rows, places, None)


def written_slots(writes: Sequence[Writes]) -> set[Slot]:
    """The slots inside layers that writes touch. A program that reads them has its stops in the order of the layer."""
    found: set[Slot] = set()
    for item in writes:
        if item.component != BOUNDARY:
            found |= {(item.component, int(layer)) for layer in np.unique(item.layer)}
    return found | {("mlp_out", layer) for component, layer in found if component == "resid_mid"}


def run_written(
    runtime: Runtime,
    prompts: Sequence[Prompt],
    slots: Iterable[Slot],
    writes: Sequence[Writes] = (),
    *,
    places: Sequence[Place] = (),
    keep_cache: bool = False,
) -> Capture:
    """Run a batch of prompts once with ``writes``; keep slots as they are after the writes, and logits at ``places``.

    ``places`` ascend. The whole batch is one pass: the caller sees to its size.
    """
    check_ids(runtime, [prompt.token_ids for prompt in prompts])
    ids, lengths = padded_ids([prompt.token_ids for prompt in prompts], pad_token(runtime), runtime.device)
    wanted = set(slots) | written_slots(writes)
    readout = None
    if places:
        batch, column = torch.tensor(list(places)).T
        readout = readout_at(runtime, batch, column, logits=True)
    program, order = capture_program(runtime, ids, lengths, wanted, readout)
    if writes:
        write_into(runtime, program, writes, lengths.tolist())
    return run_capture(runtime, program, order, ids, lengths, keep_cache=keep_cache)
