"""What a bias scan keeps: its groups of results with their labels, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.experiments.bias_scan.recipe import BiasScanRecipe, NeuronOptions
from nsp.experiments.labels import Group, Variable, index_coord, text_coord

NEURONS, FOUND, ABLATION, NEUTRAL = "effects/mlp_neurons", "circuit/found", "effects/ablation", "effects/neutral"
# What `neuron_layer` holds where no neuron was patched.
NO_STAR_LAYER, NOT_DRAWN = -2, -3
_KL = "KL(aligned || base) of the next-token distribution"
_SCORE = "log-probability of the sentence after the beginning-of-text token"
_WHERE = {"kl": "at the last position", "kl_mean": "mean over the positions that both models have"}
_PATCH = {
    "cumulative": "patched from the aligned run at layers 0 to this one, all shared positions",
    "single": "patched from the aligned run at this layer, all shared positions",
    "together": "patched from the aligned run at all scanned layers at once, all shared positions",
}
_logprob = partial(Variable, ("prompt",), units="nats", dtype=np.float64)


def scan_groups(
    recipe: BiasScanRecipe, prompts: int, layers: Sequence[int], *, neurons: int, refusal: str, maps: Mapping[str, Any] | None
) -> dict[str, Group]:
    """Every group but ``inputs`` and the alignment scan's, by path.

    Args:
        prompts: how many there are; ``layers`` the labels of the dim ``layer``; ``neurons`` how many a layer has.
        refusal: why the model does not take the branch path; empty where it does.
        maps: what `fit_maps` gave, where models of two widths are compared.
    """
    prompt = {"prompt": index_coord("prompt", prompts, "prompt, from 0, shortest first")}
    kinds = ("kl", "kl_mean") if recipe.mean_over_positions else ("kl",)
    ablated = f"base with {', '.join(recipe.ablate)} ablated ({recipe.ablation})"
    run = ablated if recipe.ablate else "ordinary forward pass of both models"
    baseline = {name: Variable(("prompt",), f"{_KL}, {_WHERE[name]}, unpatched", "nats", run) for name in kinds}
    for model in ("aligned", "base"):
        baseline[f"logprob_{model}"] = _logprob(f"{_SCORE}, {model} model", method="sum over tokens")
    groups = {"baseline": Group(baseline, prompt)}
    coords = {**prompt, "layer": index_coord("layer", layers, "layer")}
    path = "plain" if refusal else "branch"
    receipt = {"path": path, "path_reason": refusal or "attention is causal and the self-check passed"}
    for component in recipe.components:
        cell = partial(Variable, ("prompt", "layer"), method=f"{component} {_PATCH[recipe.patch]}; {path} path")
        effects = {}
        for name in kinds:
            effects[name] = cell(f"KL(aligned || patched base), {_WHERE[name]}", "nats")
            effects[f"delta_{name}"] = cell(
                f"patched less unpatched KL, {_WHERE[name]}: negative where patching removes divergence", "nats"
            )
        attrs: dict[str, Any] = {"patch": recipe.patch, "layers": [int(layer) for layer in layers]}
        if maps is not None:
            attrs |= {"map_r2": [float(value) for value in maps["r2"][component]], "map_tokens": int(maps["tokens"])}
        groups[f"effects/{component}"] = Group(effects, coords, attrs)
        fired = "writes made (0: the values are the base's own, nothing ran; -1: not computed)"
        receipts = {
            "fired": cell(fired, dtype=np.int32),
            "change_norm": cell("L2 norm of what was changed at the site", "activation"),
        }
        groups[f"receipts/{component}"] = Group(receipts, coords, receipt)
    return groups if recipe.neurons is None else groups | _neuron_groups(recipe.neurons, prompt, neurons)


def _neuron_groups(options: NeuronOptions, prompt: Mapping[str, xr.Variable], neurons: int) -> dict[str, Group]:
    where = "at the last position" if options.positions == "last" else "at all shared positions"
    patched = f"each neuron alone patched from the aligned run {where}, in the layer that neuron_layer says"
    layer = "layer whose neurons were patched (-1: not computed; -2: the prompt has no star layer; -3: not drawn)"
    chosen = "the prompt's star layer, or the layer given"
    effects = {
        "delta_kl": Variable(("prompt", "neuron"), "patched less unpatched KL at the last position", "nats", patched),
        "neuron_layer": Variable(("prompt",), layer, "1", chosen, np.int32),
    }
    attrs = {"layer": options.layer, "positions": options.positions, "top": options.top}
    ranked = partial(
        Variable, ("neuron",), method="sum of what the neuron removes over prompts where it was patched, over all prompts"
    )
    found = {
        "layer_of": ranked("layer of the neuron (-1: none)", dtype=np.int32),
        "neuron_of": ranked("number of the neuron in its layer (-1: none)", dtype=np.int32),
        "removed": ranked("divergence that the neuron removes", "nats"),
    }
    ablated = f"found neurons ablated ({options.ablation}) in the base model at all positions"
    ablation = {
        "kl": Variable(("prompt",), f"{_KL}, at the last position, found neurons ablated", "nats", ablated),
        "logprob": _logprob(f"{_SCORE}, base model, found neurons ablated", method=ablated),
    }
    neutral = {
        "logprob_base": _logprob(f"{_SCORE}, base model", method="sum over tokens"),
        "logprob_ablated": _logprob(f"{_SCORE}, found neurons ablated", method=ablated),
        "n_scored": Variable(("prompt",), "tokens of the sentence (-1: not computed)", "1", "count", np.int32),
    }
    sentences = {
        "prompt": index_coord("prompt", len(NEUTRAL_SENTENCES), "neutral sentence, from 0"),
        "text": text_coord("prompt", NEUTRAL_SENTENCES, "neutral sentence"),
    }
    return {
        NEURONS: Group(effects, {**prompt, "neuron": index_coord("neuron", neurons, "MLP neuron")}, attrs),
        FOUND: Group(found, {"neuron": index_coord("neuron", options.top, "rank of the neuron, best first")}),
        ABLATION: Group(ablation, prompt),
        NEUTRAL: Group(neutral, sentences),
    }
