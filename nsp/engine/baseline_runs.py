"""The baseline runs of a request, which nothing is written into: base prompts, donors and references together, each distinct prompt once.

From them come the trunk (what branches share), the donors' values, and every metric on the runs without interventions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Ints
from nsp.engine.kernels import APPLIED, metric_values
from nsp.engine.readout import Measure, logits_at
from nsp.engine.recording import Recording, record
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot
from nsp.errors import InputError
from nsp.metrics import METRICS

Place = tuple[int, int]  # (row of the recording, position)


@dataclass(eq=False)
class BaselineRuns:
    """The baseline runs, kept.

    Attributes:
        recording: all rows; ``row`` finds a prompt's.
        logits: float32 (place, token), over ``vocabulary`` (all tokens where None); ``place`` finds a (row, position).
    """

    recording: Recording
    row: dict[tuple[int, ...], int]
    logits: torch.Tensor | None = None
    vocabulary: torch.Tensor | None = None
    place: dict[Place, int] = field(default_factory=dict)

    def rows(self, prompts: Iterable[Prompt]) -> Ints:
        """The recording's row of each prompt."""
        return np.array([self.row[prompt.token_ids] for prompt in prompts], dtype=np.int64)

    def logits_at(self, prompts: Sequence[Prompt], positions: Sequence[int]) -> torch.Tensor:
        """Logits of each prompt at its position: (prompt, token)."""
        assert self.logits is not None
        rows = self.rows(prompts)
        return self.logits[[self.place[int(row), at] for row, at in zip(rows, positions, strict=True)]]

    def measured(self, measure: Measure, prompts: Sequence[Prompt], positions: Sequence[int]) -> torch.Tensor:
        """A metric on these runs: one value per prompt, axis (prompt,)."""
        if measure.boundary is not None:
            streams = self.recording.values[(BOUNDARY, measure.boundary)]
            rows = torch.as_tensor(self.rows(prompts), device=streams.device)
            places = torch.tensor(list(positions), device=streams.device)
            return measure.projected(streams[rows, places])
        logits = self.logits_at(prompts, positions)
        tokens = measure.tokens
        if tokens is not None and self.vocabulary is not None:
            tokens = torch.searchsorted(self.vocabulary, tokens)
        reference = measure.reference
        try:
            return metric_values(
                measure.kind,
                logits,
                None if tokens is None else tokens.to(logits.device),
                None if reference is None else reference.to(logits.device),
            )
        except ValueError as error:
            if str(error).startswith(APPLIED):
                raise InputError(f"metric {measure.metric.name}: {error}") from None
            raise


def run_baseline(
    runtime: Runtime,
    prompts: Iterable[Prompt],
    slots: set[Slot],
    places: Iterable[tuple[Prompt, int]],
    measures: Sequence[Measure],
    *,
    keep_cache: bool,
    max_tokens: int,
) -> BaselineRuns:
    """Run each distinct prompt once; keep ``slots`` and the logits at ``places``, as far as ``measures`` read them."""
    distinct = dict.fromkeys(prompt.token_ids for prompt in prompts)
    row = {ids: number for number, ids in enumerate(distinct)}
    wanted = sorted({(row[prompt.token_ids], position) for prompt, position in places})
    readout, vocabulary = None, None
    if wanted:
        if not any(METRICS[measure.metric.kind].needs == "full" for measure in measures):
            vocabulary = torch.unique(torch.cat([m.tokens.reshape(-1) for m in measures if m.tokens is not None]))
        readout = logits_at(runtime, wanted, vocabulary)
    kept = record(
        runtime, list(distinct), slots, keep_cache=keep_cache, readout=readout, max_tokens=max_tokens, stay=True
    )
    return BaselineRuns(kept, row, kept.logits, vocabulary, {place: number for number, place in enumerate(wanted)})
