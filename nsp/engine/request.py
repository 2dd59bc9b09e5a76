"""What to run, as a value: base prompts, interventions, donors, metrics; and what its metrics read of which prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Writes
from nsp.engine.readout import Measure
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.interventions import Intervention, Patch
from nsp.metrics import METRICS, Metric


@dataclass(frozen=True, eq=False)
class Request:
    """What to run.

    Attributes:
        bases: the base prompts.
        swept: interventions that move together over the cells of ``axes``; ``fixed`` ones are stated in every branch. The
            donor of a patch is a prompt, one prompt for each base, a recording or a tensor.
        axes: the swept axes, of ``layer``, ``position``, ``unit``; none is one counterfactual for each base.
        cumulative: the cell of a layer has the swept interventions at the layers before it too.
        metrics: what is measured; ``tokens[m]`` holds the token ids of metric ``m`` with axes (base, 1 or 2), or None;
            those of a continuation (base, any number), -1 after the end of a shorter one. Without metrics each branch
            runs to the end of its prompt, so that text can be generated from it.
        reference: the donor run's prompts that distances and effects are measured from, or None.
        carried: writes in every run of the bases, and so in all branches; ``branch`` is the base's number.
        path: ``auto`` takes the branch path where it is right; ``branch`` and ``plain`` insist.
    """

    bases: tuple[Prompt, ...]
    swept: tuple[Intervention, ...] = ()
    metrics: tuple[Metric, ...] = ()
    tokens: tuple[torch.Tensor | None, ...] = ()
    fixed: tuple[Intervention, ...] = ()
    axes: tuple[str, ...] = ()
    reference: tuple[Prompt, ...] | None = None
    carried: tuple[Writes, ...] = ()
    path: str = "auto"
    cumulative: bool = False

    def donors(self, intervention: Intervention) -> tuple[Prompt, ...] | None:
        """The donor prompts of a patch, one for each base; None for what has none (recordings, tensors, other operations)."""
        donor = intervention.donor if isinstance(intervention, Patch) else None
        if isinstance(donor, Prompt):
            return (donor,) * len(self.bases)
        if not isinstance(donor, tuple | list):
            return None
        if len(donor) != len(self.bases):
            raise InputError(
                f"patch: {len(donor)} donors for {len(self.bases)} prompts; give one donor, or one for each prompt"
            )
        return tuple(donor)


def request_measures(request: Request) -> tuple[list[Measure], list[tuple[int, ...]] | None]:
    """The measures on the bases, and the positions that they read on the reference prompts.

    A continuation of n tokens is n measures, the log-probability of each token where the ones before it end.
    """
    measures: list[Measure] = []
    moved: list[tuple[int, ...]] = []
    for number, (metric, tokens) in enumerate(zip(request.metrics, request.tokens, strict=True)):
        at = tuple(_position(metric, prompt) for prompt in request.bases)
        there = at
        if request.reference is not None:
            pairs = zip(request.bases, request.reference, strict=True)
            there = tuple(_reference_position(metric, base, donor) for base, donor in pairs)
        if METRICS[metric.kind].several and tokens is not None:
            lengths = (tokens >= 0).sum(dim=1).numpy()
            for step in range(tokens.shape[1]):
                inside = step < lengths
                add = np.where(inside, step, 0)
                weight = np.where(inside, -1.0 / lengths, 0.0)
                column = tokens[:, step : step + 1].clamp(min=0)
                each = Metric("logprob", name=metric.name)
                measures.append(Measure(each, column, _moved(at, add), None, number, weight))
                moved.append(_moved(there, add))
            continue
        measure = Measure(metric, tokens, at, None, number, of_donor=metric.reference == "donor")
        if METRICS[metric.kind].setting == "direction":
            assert metric.layer is not None
            vector = torch.tensor(metric.direction, dtype=torch.float64)
            measure.boundary, measure.direction = metric.layer + 1, vector / vector.norm()
        measures.append(measure)
        moved.append(there)
    return measures, None if request.reference is None else moved


def _moved(positions: Sequence[int], by: np.ndarray) -> tuple[int, ...]:
    return tuple(int(position + step) for position, step in zip(positions, by, strict=True))


def continuations(request: Request) -> list[tuple[int, ...]] | None:
    """What follows each prompt, less the last token, which predicts nothing; None where no continuation is measured.

    Sites and metrics are selected in the prompts without it: it is what comes after the last token.
    """
    stated = [
        (metric, tokens)
        for metric, tokens in zip(request.metrics, request.tokens, strict=True)
        if METRICS[metric.kind].several and tokens is not None
    ]
    if not stated:
        return None
    (first, tokens), *others = stated
    for metric, given in others:
        if given.shape != tokens.shape or not bool((given == tokens).all()):
            raise InputError(
                f"metrics {first.name} and {metric.name}: all prompts run once, with one continuation; measure the other one in a run of its own"
            )
    return [tuple(int(token) for token in row if token >= 0)[:-1] for row in tokens]


def followed(prompts: Sequence[Prompt], tails: Sequence[tuple[int, ...]] | None) -> Sequence[Prompt]:
    """The prompts, each followed by its continuation."""
    if tails is None:
        return prompts
    return [
        replace(
            prompt,
            token_ids=(*prompt.token_ids, *tail),
            token_texts=(*prompt.token_texts, *("" for _ in tail)),
            offsets=None,
        )
        for prompt, tail in zip(prompts, tails, strict=True)
    ]


def check_request(runtime: Runtime, request: Request) -> None:
    """Refuse, before anything runs, metric tokens and layers that the model does not have."""
    size = runtime.geometry.vocab_size
    for metric, tokens in zip(request.metrics, request.tokens, strict=True):
        least = -1 if METRICS[metric.kind].several else 0
        if tokens is not None and not least <= int(tokens.min()) <= int(tokens.max()) < size:
            raise InputError(
                f"metric {metric.name}: token ids must be in the model's vocabulary (0 to {size - 1}), got {tokens.max()}"
            )
        width, layers = runtime.geometry.d_model, runtime.geometry.n_layers
        if metric.direction and len(metric.direction) != width:
            raise InputError(
                f"metric {metric.name}: the direction has {len(metric.direction)} numbers, the residual stream {width}"
            )
        if metric.layer is not None and not 0 <= metric.layer < layers:
            raise InputError(f"metric {metric.name}: there is no layer {metric.layer}; layers are 0 to {layers - 1}")


def _position(metric: Metric, prompt: Prompt) -> int:
    positions = prompt.positions(metric.selection)
    if len(positions) != 1:
        raise InputError(
            f"metric {metric.name}: {metric.position!r} selects {len(positions)} positions; a metric reads one"
        )
    return int(positions[0])


def _reference_position(metric: Metric, base: Prompt, donor: Prompt) -> int:
    """Where a metric reads the donor run: an index means the same token only in prompts of one length."""
    selection = metric.selection
    by_index = selection is not None and any(not isinstance(item, str) for item in selection.items)
    if by_index and len(base) != len(donor):
        raise InputError(
            f"metric {metric.name}: position {metric.position!r} is an index, and the donor has {len(donor)} tokens where the base has {len(base)}; "
            "measure at 'last' or at a named span that both have"
        )
    return _position(metric, donor)
