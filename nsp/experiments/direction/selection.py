"""Candidate directions, one per layer and position, and the choice among them.

``r(l, p) = mean over the positive training prompts of x(l, p) - mean over the negative ones``, with x(l, p) the residual
stream that layer l receives at the p-th token after the instruction. Each candidate is tried on the validation part: its
ablation on the positive prompts (does the behaviour go?), its addition on the negative ones (does it come?), and the KL
divergence that ablation makes on the negative ones (does the rest stay?). Arditi et al. 2024, section 2.3, appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.engine.engine import Engine
from nsp.engine.request import Request
from nsp.errors import InputError
from nsp.experiments.direction.interventions import direction_addition, directional_ablation
from nsp.experiments.direction.prompts import SETS, Divided
from nsp.experiments.direction.recipe import SelectOptions
from nsp.experiments.direction.scores import Opening, run_scores, score_request
from nsp.model import Model
from nsp.progress import BranchProgress
from nsp.sites import Selection, Site


@dataclass(frozen=True)
class LayerScores:
    """What the candidates of one layer do on the validation part, means over prompts, axis (position,).

    Attributes:
        ablated: score of the positive prompts under ablation; ``drop`` how far it is below their own.
        added: score of the negative prompts under addition; ``rise`` how far it is above their own.
        kl: of the negative prompts' next-token distributions under ablation, from their own.
    """

    ablated: np.ndarray
    added: np.ndarray
    drop: np.ndarray
    rise: np.ndarray
    kl: np.ndarray


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, by its numbers in the layers and positions; ``passed``: whether it keeps all conditions."""

    layer: int
    place: int
    passed: bool


def candidate_layers(model: Model, layers: str, below: float) -> tuple[int, ...]:
    """The layers of a recipe that are below a share of the depth."""
    count = model.geometry.n_layers
    chosen = Selection.of(layers).resolve(count, what="layer")
    kept = tuple(sorted({layer for layer in chosen if layer < below * count}))
    if not kept:
        raise InputError(f"no layer of {layers} is below {below:g} of the {count} layers; raise select.below")
    return kept


def mean_differences(engine: Engine, divided: Divided, layers: Sequence[int]) -> np.ndarray:
    """Difference of the sets' means over the training part: float32 with axes (layer, position, neuron)."""
    means = []
    for which in SETS:
        prompts = divided.of("train", which)
        total = torch.zeros(len(layers), divided.places, engine.runtime.geometry.d_model, dtype=torch.float64)
        from_end = torch.arange(-divided.places, 0)
        for kept in engine.recordings(prompts, [Site.of("resid_pre", layers)]):
            rows, columns = torch.arange(len(kept.rows))[:, None], kept.lengths[:, None] + from_end
            streams = [kept.at("resid_pre", layer) for layer in layers]
            # Summed in float64: the stream's few large columns would swallow the others' digits.
            sums = [stream[rows.to(stream.device), columns.to(stream.device)].double().sum(dim=0) for stream in streams]
            total += torch.stack(sums).cpu()
        means.append(total / len(prompts))
    return np.asarray((means[0] - means[1]).numpy(), dtype=np.float32)


def ablation_request(model: Model, divided: Divided, openings: Sequence[Opening], candidates: np.ndarray) -> Request:
    """Ablate every candidate, axes (position, neuron), on both sets' validation prompts: bases are (position, prompt)."""
    prompts = (*divided.of("validation", "positive"), *divided.of("validation", "negative"))
    vectors = torch.from_numpy(candidates).repeat_interleave(len(prompts), dim=0)
    return score_request(prompts * len(candidates), openings, fixed=directional_ablation(model, vectors[:, None]))


def addition_request(
    divided: Divided, openings: Sequence[Opening], layer: int, candidates: np.ndarray, coefficient: float
) -> Request:
    """Add every candidate on the negative validation prompts: bases are (position, prompt)."""
    prompts = divided.of("validation", "negative")
    vectors = torch.from_numpy(candidates).repeat_interleave(len(prompts), dim=0)
    added = direction_addition(layer, vectors[:, None], coefficient)
    return score_request(prompts * len(candidates), openings, swept=added, with_kl=False)


def layer_scores(
    model: Model,
    engine: Engine,
    divided: Divided,
    openings: Sequence[Opening],
    layer: int,
    candidates: np.ndarray,
    coefficient: float,
    progress: BranchProgress | None = None,
) -> LayerScores:
    """Try the candidates of one layer, axes (position, neuron), on the validation part."""
    count, positive = len(candidates), len(divided.of("validation", "positive"))

    def table(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float64).reshape(count, -1)

    ablated = run_scores(engine, ablation_request(model, divided, openings, candidates), progress)
    score, base = table(ablated.score)[:, :positive], table(ablated.base)[:, :positive]
    added = run_scores(engine, addition_request(divided, openings, layer, candidates, coefficient), progress)
    return LayerScores(
        ablated=score.mean(axis=1),
        drop=(base - score).mean(axis=1),
        kl=table(ablated.kl)[:, positive:].mean(axis=1),
        added=table(added.score).mean(axis=1),
        rise=(table(added.score) - table(added.base)).mean(axis=1),
    )


def choose(drop: np.ndarray, rise: np.ndarray, kl: np.ndarray, options: SelectOptions) -> Choice:
    """The candidate with the largest effect, arrays with axes (layer, position).

    Those pass whose ablation lowers the score, whose addition raises it and whose KL is small; where none passes, the
    best of all is taken and not called passed.
    """
    value = {"ablation": drop, "addition": rise, "both": np.minimum(drop, rise)}[options.by]
    finite = np.isfinite(drop) & np.isfinite(rise) & np.isfinite(kl)
    passing = finite & (drop > 0) & (rise > 0) & (kl <= options.max_kl)
    allowed = passing if passing.any() else finite
    if not allowed.any():
        raise InputError("every candidate's effect is NaN or infinite; try another dtype, such as float32")
    layer, place = np.unravel_index(int(np.where(allowed, value, -np.inf).argmax()), value.shape)
    return Choice(int(layer), int(place), bool(passing.any()))
