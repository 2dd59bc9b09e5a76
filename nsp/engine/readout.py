"""From metrics to what a pass must project: the rows and vocabulary entries that are needed, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsp.engine.program import MetricStep, Readout
from nsp.engine.runtime import Runtime
from nsp.metrics import METRICS, Metric

# Bytes that one chunk of full-vocabulary work may take: float32 logits and a few float64 copies of them.
_CHUNK_BYTES = 256 * 2**20
_BYTES_PER_ENTRY = 4 + 4 * 8


@dataclass
class Measure:
    """One metric, resolved for a set of base prompts.

    Attributes:
        metric: what is measured.
        tokens: token ids with axes (base, 1 or 2), or None.
        positions: the position measured, one a base.
        reference: float32 reference logits with axes (base, token), or None; filled once the reference runs are done.
    """

    metric: Metric
    tokens: torch.Tensor | None
    positions: tuple[int, ...]
    reference: torch.Tensor | None = None


def chunk_rows(vocabulary: int) -> int:
    """How many readouts are projected onto the whole vocabulary at a time."""
    return max(1, _CHUNK_BYTES // (vocabulary * _BYTES_PER_ENTRY))


def readout_rows(measures: Sequence[Measure], bases: torch.Tensor) -> list[torch.Tensor]:
    """The position that each measure reads, for branches of the given bases: one (branch,) tensor a measure."""
    return [torch.tensor(measure.positions)[bases] for measure in measures]


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

    Places that several measures share are projected once.
    """
    geometry, device = runtime.geometry, runtime.device
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
        # The executor walks readouts in order, so each metric's branches are put in the order of their places.
        order = torch.argsort(place, stable=True)
        steps.append(
            {
                "kind": measure.metric.kind,
                "tokens": None if tokens is None else tokens[order].to(device),
                "reference": None if measure.reference is None else measure.reference.to(device),
                "reference_row": None if measure.reference is None else bases[order].to(device),
                "select": place[order].to(device),
            }
        )
    return {
        "norm": geometry.table.final_norm,
        "head": geometry.table.head,
        "batch": unique[:, 0].to(device),
        "column": unique[:, 1].to(device),
        "vocabulary": None if vocabulary is None else vocabulary.to(device),
        "metrics": steps,
        "logits": logits,
        "choice": None,
        "chunk": chunk_rows(geometry.vocab_size),
        "softcap": geometry.softcap,
        "logit_scale": geometry.logit_scale,
    }


def unsorted_metrics(
    values: Sequence[torch.Tensor], bases: torch.Tensor, batch: Sequence[torch.Tensor], column: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Metric values in the order of the branches again (`build_readout` put them in the order of their places)."""
    if not values:
        return []
    places = torch.cat([torch.stack([b, c], 1) for b, c in zip(batch, column, strict=True)])
    _, inverse = torch.unique(places, dim=0, return_inverse=True)
    result = []
    for number, value in enumerate(values):
        order = torch.argsort(inverse[number * len(bases) : (number + 1) * len(bases)], stable=True)
        restored = torch.empty(len(bases), dtype=torch.float32)
        restored[order] = value.cpu()
        result.append(restored)
    return result


def needs_reference(measures: Sequence[Measure]) -> bool:
    """Whether any metric is a distance from another run's logits."""
    return any(METRICS[measure.metric.kind].reference for measure in measures)
