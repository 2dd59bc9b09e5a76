"""The trunk: the runs of base prompts, donors and references together, each distinct prompt once.

From them come what branches start from, the donors' values, and every metric without the branches' interventions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.engine.branches import Bases, Ints
from nsp.engine.budget import Budget
from nsp.engine.kernels import APPLIED, metric_values
from nsp.engine.readout import Measure, at_head, logits_at
from nsp.engine.recording import Recording, record
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, stream_slots
from nsp.errors import InputError
from nsp.metrics import METRICS


@dataclass(eq=False)
class Trunk:
    """The runs of some bases, kept.

    Attributes:
        recording: all runs; ``bases`` the bases' rows of what branches read.
        values: each measure on the bases, one array (base,) for each; ``reference`` the same on the references, or None.
    """

    recording: Recording
    bases: Recording
    values: list[np.ndarray]
    reference: list[np.ndarray] | None


def run_bases(runtime: Runtime, bases: Bases, budget: Budget) -> Trunk:
    """The trunk of some bases, made on the first call."""
    if bases.trunk is None:
        bases.trunk = _run(runtime, bases, budget)
    return bases.trunk


def _run(runtime: Runtime, bases: Bases, budget: Budget) -> Trunk:
    measures, branching = bases.measures, bases.path == "branch"
    slots = {*bases.slots, *((BOUNDARY, measure.boundary) for measure in measures if measure.boundary is not None)}
    if branching:
        slots.update(stream_slots(bases.n_layers))
    # Where each measure reads the bases, and the references.
    reads = [(bases.rows, [measure.positions for measure in measures])]
    if bases.reference is not None and bases.reference_positions is not None:
        reads.append((bases.runs_of(bases.reference), bases.reference_positions))
    head = at_head(measures)
    wanted = [(rows.tolist(), positions[number]) for rows, positions in reads for number in head]
    places = sorted({place for rows, positions in wanted for place in zip(rows, positions, strict=True)})
    vocabulary = None
    if places and not any(measures[number].metric.needs == "full" for number in head):
        vocabulary = torch.unique(torch.cat([m.tokens.reshape(-1) for m in measures if m.tokens is not None]))
    recording = record(
        runtime,
        bases.run_ids,
        slots,
        writes=bases.carried,
        readout=logits_at(runtime, places, vocabulary) if places else None,
        keep_cache=branching,
        budget=budget,
        stay=True,
    )
    logits = _Logits(recording.logits, {place: number for number, place in enumerate(places)}, vocabulary)
    for number, measure in enumerate(measures):
        if METRICS[measure.metric.kind].reference and measure.reference is None:
            if len(reads) == 1 and measure.of_donor:
                raise InputError(
                    f"{measure.metric.name}: there is no donor run to measure the distance from; give reference='base'"
                )
            rows, positions = reads[measure.of_donor]
            measure.reference = logits.at(rows, positions[number])
    measured = [
        _measured(measure, recording, logits, rows, positions[number])
        for rows, positions in reads
        for number, measure in enumerate(measures)
    ]
    values = [value.cpu().numpy() for value in runtime.fetch(measured)]
    count = len(measures)
    return Trunk(recording, recording.only(bases.rows), values[:count], values[count:] if len(reads) > 1 else None)


@dataclass(frozen=True, eq=False)
class _Logits:
    """Float32 logits (place, token) over ``vocabulary`` (all tokens where None); ``place`` finds a (run, position)."""

    values: torch.Tensor | None
    place: dict[tuple[int, int], int]
    vocabulary: torch.Tensor | None

    def at(self, rows: Ints, positions: Sequence[int]) -> torch.Tensor:
        """Those of each row at its position: (row, token)."""
        assert self.values is not None
        return self.values[[self.place[place] for place in zip(rows.tolist(), positions, strict=True)]]


def _measured(
    measure: Measure, recording: Recording, logits: _Logits, rows: Ints, positions: Sequence[int]
) -> torch.Tensor:
    """A measure on some runs: one value for each, axis (run,)."""
    if measure.boundary is not None:
        streams = recording.values[BOUNDARY, measure.boundary]
        at = torch.as_tensor(rows, device=streams.device), torch.tensor(list(positions), device=streams.device)
        return measure.projected(streams[at])
    values, tokens, reference = logits.at(rows, positions), measure.tokens, measure.reference
    if tokens is not None:
        if logits.vocabulary is not None:
            tokens = torch.searchsorted(logits.vocabulary, tokens)
        tokens = tokens.to(values.device)
    try:
        return metric_values(measure.kind, values, tokens, None if reference is None else reference.to(values.device))
    except ValueError as error:
        if str(error).startswith(APPLIED):
            raise InputError(f"metric {measure.metric.name}: {error}") from None
        raise
