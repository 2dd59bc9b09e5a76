"""The store of a bias scan: its groups, variables and labels, results blank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.experiments.bias_scan.recipe import BiasScanRecipe
from nsp.experiments.labels import index_coord, text_array

_KL = "KL(aligned || base) of the next-token distribution"
_SCORE = "log-probability of the sentence after the beginning-of-text token"
_PATCH = {
    "cumulative": "patched from the aligned run at layers 0 to this one, all shared positions",
    "single": "patched from the aligned run at this layer, all shared positions",
    "together": "patched from the aligned run at all scanned layers at once, all shared positions",
}


def blank_tree(
    inputs: xr.Dataset,
    recipe: BiasScanRecipe,
    *,
    cells: Sequence[int],
    neurons: int,
    path: str,
    reason: str,
    fits: Mapping[str, Any] | None,
) -> dict[str, xr.Dataset]:
    """Every group but the alignment scan's, by path."""
    count = int(inputs.sizes["prompt"])
    prompt = {"prompt": index_coord("prompt", count, "prompt, from 0, shortest first")}
    means = ("kl", "kl_mean") if recipe.mean_over_positions else ("kl",)
    where = {"kl": "at the last position", "kl_mean": "mean over the positions that both models have"}
    run = (
        "ordinary forward pass of both models"
        if not recipe.ablate
        else f"base with {', '.join(recipe.ablate)} ablated ({recipe.ablation})"
    )
    tree: dict[str, xr.Dataset] = {"inputs": inputs}
    baseline = {name: _blank(("prompt",), (count,), f"{_KL}, {where[name]}, unpatched", "nats", run) for name in means}
    for model in ("aligned", "base"):
        baseline[f"logprob_{model}"] = _blank(
            ("prompt",), (count,), f"{_SCORE}, {model} model", "nats", "sum over tokens", np.float64
        )
    tree["baseline"] = xr.Dataset(baseline, prompt)
    for component in recipe.components:
        how = f"{component} {_PATCH[recipe.patch]}; {path} path"
        coords = {**prompt, "layer": index_coord("layer", np.asarray(cells), "layer")}
        dims, shape = ("prompt", "layer"), (count, len(cells))
        variables = {}
        for name in means:
            variables[name] = _blank(dims, shape, f"KL(aligned || patched base), {where[name]}", "nats", how)
            variables[f"delta_{name}"] = _blank(
                dims,
                shape,
                f"patched less unpatched KL, {where[name]}: negative where patching removes divergence",
                "nats",
                how,
            )
        attrs: dict[str, Any] = {"patch": recipe.patch, "layers": [int(layer) for layer in cells]}
        if fits is not None:
            attrs |= {"map_r2": [float(value) for value in fits["r2"][component]], "map_tokens": int(fits["tokens"])}
        tree[f"effects/{component}"] = xr.Dataset(variables, coords, attrs)
        tree[f"receipts/{component}"] = xr.Dataset(
            {
                "fired": _blank(dims, shape, "writes made (0: the values are the base's own, nothing ran; -1: not computed)", "1", how, np.int32),
                "change_norm": _blank(dims, shape, "L2 norm of what was changed at the site", "activation", how),
            },
            coords,
            {"path": path, "path_reason": reason or "attention is causal and the self-check passed"},
        )  # fmt: skip
    if recipe.neurons is not None:
        tree |= _neuron_groups(recipe, prompt, count, neurons)
    return tree


def _neuron_groups(
    recipe: BiasScanRecipe, prompt: Mapping[str, Any], count: int, neurons: int
) -> dict[str, xr.Dataset]:
    options = recipe.neurons
    assert options is not None
    where = "at the last position" if options.positions == "last" else "at all shared positions"
    how = f"each neuron alone patched from the aligned run {where}, in the layer that neuron_layer says"
    label = "layer whose neurons were patched (-1: not computed; -2: the prompt has no star layer; -3: not drawn)"
    coords = {**prompt, "neuron": index_coord("neuron", neurons, "MLP neuron")}
    effects = xr.Dataset(
        {
            "delta_kl": _blank(("prompt", "neuron"), (count, neurons), "patched less unpatched KL at the last position", "nats", how),
            "neuron_layer": _blank(("prompt",), (count,), label, "1", "the prompt's star layer, or the layer given", np.int32),
        },
        coords,
        {"layer": options.layer, "positions": options.positions, "top": options.top},
    )  # fmt: skip
    rank = {"neuron": index_coord("neuron", options.top, "rank of the neuron, best first")}
    how = "sum of what the neuron removes over prompts where it was patched, over all prompts"
    found = xr.Dataset(
        {
            "layer_of": _blank(("neuron",), (options.top,), "layer of the neuron (-1: none)", "1", how, np.int32),
            "neuron_of": _blank(
                ("neuron",), (options.top,), "number of the neuron in its layer (-1: none)", "1", how, np.int32
            ),
            "removed": _blank(("neuron",), (options.top,), "divergence that the neuron removes", "nats", how),
        },
        rank,
    )
    ablated = f"found neurons ablated ({options.ablation}) in the base model at all positions"
    ablation = xr.Dataset(
        {
            "kl": _blank(("prompt",), (count,), f"{_KL}, at the last position, found neurons ablated", "nats", ablated),
            "logprob": _blank(
                ("prompt",), (count,), f"{_SCORE}, base model, found neurons ablated", "nats", ablated, np.float64
            ),
        },
        prompt,
    )
    size = len(NEUTRAL_SENTENCES)
    neutral = xr.Dataset(
        {
            "logprob_base": _blank(
                ("prompt",), (size,), f"{_SCORE}, base model", "nats", "sum over tokens", np.float64
            ),
            "logprob_ablated": _blank(
                ("prompt",), (size,), f"{_SCORE}, found neurons ablated", "nats", ablated, np.float64
            ),
            "n_scored": _blank(
                ("prompt",), (size,), "tokens of the sentence (-1: not computed)", "1", "count", np.int32
            ),
        },
        {
            "prompt": index_coord("prompt", size, "neutral sentence, from 0"),
            "text": xr.Variable(("prompt",), text_array(NEUTRAL_SENTENCES), {"long_name": "neutral sentence"}),
        },
    )
    return {
        "effects/mlp_neurons": effects,
        "circuit/found": found,
        "effects/ablation": ablation,
        "effects/neutral": neutral,
    }


def _blank(
    dims: tuple[str, ...], shape: tuple[int, ...], name: str, units: str, method: str, dtype: Any = np.float32
) -> tuple[Any, ...]:
    fill = -1 if np.issubdtype(dtype, np.integer) else np.nan
    return (dims, np.full(shape, fill, dtype=dtype), {"long_name": name, "units": units, "method": method})
