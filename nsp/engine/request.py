"""What to run, as a value: base prompts, interventions, donors, metrics; and what its metrics read of which prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.forward_pass import check_ids
from nsp.engine.readout import Measure
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.interventions import Intervention
from nsp.metrics import METRICS, Metric


@dataclass(frozen=True, eq=False)
class PromptDonors:
    """The donor of a patch as prompts: one for each base prompt, aligned with it."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, eq=False)
class Request:
    """What to run.

    Attributes:
        bases: the base prompts.
        swept: interventions that move together over the cells of ``axes``; ``fixed`` ones are stated in every branch.
        axes: the swept axes, of ``layer``, ``position``, ``unit``.
        donors: for each swept, then each fixed intervention: its donor prompts (patches from prompts), else None.
        cumulative: the cell of a layer has the swept interventions at the layers before it too.
        metrics: what is measured; ``tokens[m]`` holds the token ids of metric ``m`` with axes (base, 1 or 2), or None;
            those of a continuation (base, any number), -1 after the end of a shorter one.
        reference: the donor run's prompts that distances and effects are measured from, or None.
        whole: run each branch to the end of its prompt with nothing pruned, since what follows is generated from it.
        path: ``auto`` takes the branch path where it is right; ``branch`` and ``plain`` insist.
    """

    bases: tuple[Prompt, ...]
    swept: tuple[Intervention, ...]
    metrics: tuple[Metric, ...]
    tokens: tuple[torch.Tensor | None, ...]
    fixed: tuple[Intervention, ...] = ()
    axes: tuple[str, ...] = ()
    donors: tuple[PromptDonors | None, ...] = ()
    reference: tuple[Prompt, ...] | None = None
    path: str = "auto"
    whole: bool = False
    cumulative: bool = False


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
                one = Metric("logprob", name=metric.name)
                measures.append(Measure(one, column, _moved(at, add), None, number, weight))
                moved.append(_moved(there, add))
            continue
        measure = Measure(metric, tokens, at, None, number)
        if METRICS[metric.kind].setting == "direction":
            assert metric.layer is not None
            vector = torch.tensor(metric.direction, dtype=torch.float64)
            measure.boundary, measure.direction = metric.layer + 1, vector / vector.norm()
        measures.append(measure)
        moved.append(there)
    return measures, None if request.reference is None else moved


def _moved(positions: Sequence[int], by: np.ndarray) -> tuple[int, ...]:
    return tuple(int(position + step) for position, step in zip(positions, by, strict=True))


def continued(request: Request) -> Request:
    """The request with every prompt followed by its continuation (less the last token, which predicts nothing).

    Sites and metrics are selected in the prompts without it: it is what comes after the last token.
    """
    stated = [
        (metric, tokens)
        for metric, tokens in zip(request.metrics, request.tokens, strict=True)
        if METRICS[metric.kind].several and tokens is not None
    ]
    if not stated:
        return request
    (first, tokens), *others = stated
    for metric, given in others:
        if given.shape != tokens.shape or not bool((given == tokens).all()):
            raise InputError(
                f"metrics {first.name} and {metric.name}: all prompts run once, with one continuation; measure the other one in a run of its own"
            )
    tails = [tuple(int(token) for token in row if token >= 0)[:-1] for row in tokens]

    def followed(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        return tuple(_followed(prompt, tail) for prompt, tail in zip(prompts, tails, strict=True))

    return replace(
        request,
        bases=followed(request.bases),
        donors=tuple(None if donor is None else PromptDonors(followed(donor.prompts)) for donor in request.donors),
        reference=None if request.reference is None else followed(request.reference),
    )


def _followed(prompt: Prompt, tail: tuple[int, ...]) -> Prompt:
    return replace(
        prompt,
        token_ids=(*prompt.token_ids, *tail),
        token_texts=(*prompt.token_texts, *("" for _ in tail)),
        offsets=None,
    )


def measured_positions(request: Request, measures: Sequence[Measure]) -> list[frozenset[int]]:
    if not request.axes or request.whole:
        # A single counterfactual is run whole: what it records may lie anywhere.
        return [frozenset(range(len(prompt))) for prompt in request.bases]
    if not measures:
        raise InputError("a sweep needs something to measure: add a metric, for example logit_diff(' Mary', ' John')")
    return [frozenset(measure.positions[base] for measure in measures) for base in range(len(request.bases))]


def check_request(runtime: Runtime, request: Request) -> None:
    """Refuse, before anything runs, prompts that the model cannot read and metric tokens that it does not have."""
    donors = [prompt for donor in request.donors if donor is not None for prompt in donor.prompts]
    check_ids(runtime, [prompt.token_ids for prompt in (*request.bases, *donors)])
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
