"""From metrics to what a pass must project: the rows and vocabulary entries that are needed, and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.engine.branches import Ints
from nsp.engine.program import Choice, MetricStep, Readout
from nsp.engine.runtime import Runtime
from nsp.metrics import METRICS, Metric

# Bytes that one chunk of full-vocabulary work may take: float32 logits and a few float64 copies of them.
_CHUNK_BYTES = 256 * 2**20
_BYTES_PER_ENTRY = 4 + 4 * 8


@dataclass
class Measure:
    """One reading of a metric, resolved for a set of base prompts; a metric is one of them, or a sum of several.

    Attributes:
        metric: what is measured.
        tokens: token ids with axes (base, 1 or 2), or None.
        positions: the position measured in each base.
        reference: float32 reference logits with axes (base, token), or None; filled once the reference runs are done.
        number: the metric that it belongs to; ``weight``, axis (base,), its share in the metric's value, or None where
            it is the value.
        boundary, direction: for a projection, the boundary of the residual stream that is read, and a float64 vector
            of length 1 with axis (width,); else None.
        of_donor: whether a distance is from the donor's run; else from the base's own.
    """

    metric: Metric
    tokens: torch.Tensor | None
    positions: tuple[int, ...]
    reference: torch.Tensor | None = None
    number: int = 0
    weight: np.ndarray | None = None
    boundary: int | None = None
    direction: torch.Tensor | None = None
    of_donor: bool = False

    @property
    def kind(self) -> str | Callable[[torch.Tensor], torch.Tensor]:
        """What `nsp.engine.kernels.metric_values` takes: the metric's name, or its function."""
        return self.metric.called() if METRICS[self.metric.kind].setting == "function" else self.metric.kind

    def projected(self, states: torch.Tensor) -> torch.Tensor:
        """The projection of residual streams with axes (row, width) on the direction: float32 (row,)."""
        assert self.direction is not None
        return (states.double() @ self.direction.to(states.device)).float()


def at_head(measures: Sequence[Measure]) -> list[int]:
    """The numbers of the measures that read logits; the others read the residual stream."""
    return [number for number, measure in enumerate(measures) if measure.boundary is None]


def combined(measures: Sequence[Measure], values: Sequence[np.ndarray], base: Ints) -> list[np.ndarray]:
    """The metrics' values from those of their measures, arrays with axis (row,); ``base`` is each row's base prompt."""
    totals: dict[int, np.ndarray] = {}
    for measure, value in zip(measures, values, strict=True):
        part = value if measure.weight is None else value.astype(np.float64) * measure.weight[base]
        totals[measure.number] = totals[measure.number] + part if measure.number in totals else part
    return [np.asarray(totals[number], dtype=np.float32) for number in sorted(totals)]


def chunk_rows(vocabulary: int) -> int:
    """How many readouts are projected onto the whole vocabulary at a time."""
    return max(1, _CHUNK_BYTES // (vocabulary * _BYTES_PER_ENTRY))


def readout_at(
    runtime: Runtime,
    batch: torch.Tensor,
    column: torch.Tensor,
    *,
    vocabulary: torch.Tensor | None = None,
    metrics: Sequence[MetricStep] = (),
    logits: bool = False,
    choice: Choice | None = None,
) -> Readout:
    """The final norm and the head at the places ``(batch[i], column[i])``, on some vocabulary entries or on all."""
    geometry, device = runtime.geometry, runtime.device
    return {
        "norm": geometry.table.final_norm,
        "head": geometry.table.head,
        "batch": batch.to(device),
        "column": column.to(device),
        "vocabulary": None if vocabulary is None else vocabulary.to(device),
        "metrics": list(metrics),
        "logits": logits,
        "choice": choice,
        "chunk": chunk_rows(geometry.vocab_size),
        "softcap": geometry.softcap,
        "logit_scale": geometry.logit_scale,
    }


def logits_at(
    runtime: Runtime, places: Sequence[tuple[int, int]], vocabulary: torch.Tensor | None = None
) -> Readout:
    """The readout of float32 logits at (row, position) places, on some vocabulary entries or on all."""
    batch, column = torch.tensor(list(places)).T
    return readout_at(runtime, batch, column, vocabulary=vocabulary, logits=True)


def build_readout(
    runtime: Runtime,
    measures: Sequence[Measure],
    bases: torch.Tensor,
    batch: Sequence[torch.Tensor],
    column: Sequence[torch.Tensor],
    *,
    logits: bool = False,
) -> Readout:
    """The readout of branches: measure ``m`` of branch ``i`` is read at ``(batch[m][i], column[m][i])``.

    All of ``measures`` read logits (`at_head`). Places that several measures share are projected once.
    """
    device = runtime.device
    places = torch.cat([torch.stack([b, c], 1) for b, c in zip(batch, column, strict=True)])
    unique, inverse = torch.unique(places, dim=0, return_inverse=True)
    full = logits or any(measure.metric.needs == "full" for measure in measures)
    vocabulary = None
    if not full:
        entries = torch.cat([measure.tokens.reshape(-1) for measure in measures if measure.tokens is not None])
        vocabulary = torch.unique(entries)
    steps: list[MetricStep] = []
    for number, measure in enumerate(measures):
        place = inverse[number * len(bases) : (number + 1) * len(bases)]
        tokens = None
        if measure.tokens is not None:
            tokens = measure.tokens[bases]
            if vocabulary is not None:
                tokens = torch.searchsorted(vocabulary, tokens)
        steps.append(
            {
                "kind": measure.kind,
                "tokens": None if tokens is None else tokens.to(device),
                "reference": None if measure.reference is None else measure.reference.to(device),
                "reference_row": None if measure.reference is None else bases.to(device),
                "select": place.to(device),
            }
        )
    return readout_at(runtime, unique[:, 0], unique[:, 1], vocabulary=vocabulary, metrics=steps, logits=logits)
