"""Find a feature, give it a name, steer with it: the shortest way from an idea to a changed text.

    nsp.find_feature(model, name="cheerful", positive=["I feel great"], negative=["I feel awful"])
    nsp.steer(model, "I think this film is", feature="cheerful", multiplier=2).text

Two ways to find one: two sets of prompts give a control vector, at the layer where held-out prompts are told apart
best; a prompt and its answer give the circuit of neurons that carries it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.experiments.attribution.discovery import discover
from nsp.experiments.contrast.vectors import VectorMethod, control_vectors
from nsp.experiments.feature_store import Feature, FeatureStore, model_of
from nsp.experiments.functions import door
from nsp.experiments.steering.target import SteeringTarget
from nsp.model import Model


@dataclass(frozen=True)
class Steered:
    """A steered text beside the unsteered one.

    Attributes:
        text, plain: generated under the multiplier, and without.
        perplexity, repetition: of the steered text, in the unsteered model.
        top: the most likely next tokens under the multiplier, with their probabilities; ``plain_top`` without.
        results: everything, as `nsp.experiments.steering` returns it.
    """

    text: str
    plain: str
    multiplier: float
    perplexity: float
    repetition: float
    top: tuple[tuple[str, float], ...]
    plain_top: tuple[tuple[str, float], ...]
    results: xr.DataTree = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.text


def find_feature(
    model: Model,
    *,
    name: str,
    positive: Sequence[Any] | None = None,
    negative: Sequence[Any] | None = None,
    prompt: Any = None,
    target: str | int | None = None,
    layer: int | None = None,
    component: str = "resid_post",
    vectors: VectorMethod = "mean_difference",
    top_k: int = 50,
    store: str | Path | None = None,
    force: bool = False,
    **options: Any,
) -> Feature:
    """Find a feature and keep it under a name.

    Args:
        positive, negative: prompts that have it, and prompts that lack it: the feature is a control vector.
        prompt, target: a prompt and the token that it should be answered with (by default the model's own answer): the
            feature is the circuit of its ``top_k`` strongest neurons.
        layer, component: of the control vector; by default the layer whose vectors tell held-out prompts apart best.
        vectors: ``mean_difference``, or ``pca`` (with ``paired=True``).
        store: the folder of features; by default `nsp.experiments.features_dir`.
        force: replace a feature of that name.
        options: further options of `nsp.experiments.contrast` (at, paired, chat, ...) or of `nsp.experiments.discover`
            (counterfactual, method, positions, ...).
    """
    sets, single = positive is not None or negative is not None, prompt is not None
    if sets == single or (sets and (positive is None or negative is None)):
        raise InputError("a feature is found from positive and negative prompts, or from a prompt (and its target)")
    if sets:
        assert positive is not None
        assert negative is not None
        if target is not None:
            raise InputError("target belongs to a prompt; positive and negative prompts need none")
        kept, source = _from_sets(model, positive, negative, layer, component, vectors, name, options)
    else:
        if layer is not None:
            raise InputError("layer belongs to positive and negative prompts; a prompt's circuit lies in all layers (or name layers=…)")
        circuit = discover(model, prompt, target=target, top_k=top_k, **options)
        kept = SteeringTarget(circuit=circuit)
        source = {"prompt": circuit.prompt, "target": circuit.target, "top_k": top_k}
    feature = Feature(name, kept, model_of(model), source)
    FeatureStore(store).save(feature, force=force)
    return feature


def _from_sets(
    model: Model,
    positive: Sequence[Any],
    negative: Sequence[Any],
    layer: int | None,
    component: str,
    vectors: VectorMethod,
    name: str,
    options: Mapping[str, Any],
) -> tuple[SteeringTarget, dict[str, Any]]:
    tree = door("contrast")(
        model, positive, negative,
        components=component, vectors=vectors, decompose=False, resamples=1, layers="all" if layer is None else layer, **options,
    )  # fmt: skip
    statistics = tree[f"attribution/{component}"].to_dataset()
    scores = statistics["separation"].values
    best = layer if layer is not None else _best_layer(statistics["layer"].values, scores, model.geometry.n_layers)
    vector = control_vectors(tree, component, [best])
    score = float(scores[statistics["layer"].values.tolist().index(best)])
    texts = tree["inputs"].to_dataset()["text"].values.tolist()
    source = {
        "positive": texts[: len(positive)],
        "negative": texts[len(positive) :],
        "layer": best,
        "separation": score if np.isfinite(score) else None,
    }
    return SteeringTarget(vectors=replace(vector, name=name)), source


def _best_layer(layers: np.ndarray, separation: np.ndarray, n_layers: int) -> int:
    """The layer that separates best; the middle one where too few prompts leave that open.

    Layers of the last fifth only turn what the model has decided into its next token, so they are not taken.
    """
    inner = layers < max(1, round(0.8 * n_layers))
    scores = np.where(inner & np.isfinite(separation), separation, -np.inf)
    if not np.isfinite(scores).any():
        return int(layers[np.abs(layers - n_layers // 2).argmin()])
    return int(layers[scores.argmax()])


def steer(
    model: Model,
    prompt: Any,
    *,
    feature: str | Feature | SteeringTarget,
    multiplier: float,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    store: str | Path | None = None,
    **options: Any,
) -> Steered:
    """Continue a prompt with a feature turned up or down.

    Args:
        feature: the name of one that was kept, or a feature itself.
        multiplier: how many times the control vector is added (0: not at all), or what the circuit's neurons are
            multiplied by (1: unchanged).
        temperature: 0 is greedy; above it tokens are drawn with ``seed``.
        options: the other keys of a steering recipe: chat, positions, when, tokens, top_k.
    """
    if isinstance(feature, str):
        feature = FeatureStore(store).load(feature, model)
    target = feature.target if isinstance(feature, Feature) else feature
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    tree = door("steering")(model, [prompt], feature=target, multipliers=[multiplier], decoding=decoding, **options)
    texts = tree["generations"].to_dataset().isel(prompt=0)
    effects = tree["effects/next_token"].to_dataset().isel(prompt=0)
    strengths = texts["multiplier"].values.tolist()
    here, plain = strengths.index(multiplier), strengths.index(target.neutral)
    return Steered(
        text=str(texts["text"].values[here]),
        plain=str(texts["text"].values[plain]),
        multiplier=multiplier,
        perplexity=float(texts["perplexity"].values[here]),
        repetition=float(texts["repetition"].values[here]),
        top=_top(effects, here),
        plain_top=_top(effects, plain),
        results=tree,
    )


def _top(effects: xr.Dataset, direction: int) -> tuple[tuple[str, float], ...]:
    chosen = effects.isel(direction=direction)
    return tuple(zip(chosen["top_text"].values.tolist(), map(float, chosen["top_prob"].values), strict=True))
