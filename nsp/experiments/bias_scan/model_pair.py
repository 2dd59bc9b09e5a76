"""What a scan needs of two models: layers and outputs that can be compared, and linear maps where their widths differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.engine.slots import Slot, slot_of
from nsp.engine.token_pairing import pair_prompts
from nsp.errors import InputError
from nsp.experiments.bias_scan.recipe import BiasScanRecipe
from nsp.model import Model
from nsp.sites import Site
from nsp.statistics.regression import ridge_regression

# Ridge penalty as a share of the mean variance of a column: the sentences hold fewer tokens than a model has columns.
_RIDGE = 0.1


def check_comparable(aligned: Model, base: Model, components: Sequence[str], *, mapped: bool, neurons: bool) -> None:
    """InputError where the aligned model's activations cannot be patched into the base, or their outputs not compared."""
    if aligned is base:
        return
    a, b = aligned.geometry, base.geometry
    if a.n_layers != b.n_layers:
        raise InputError(
            f"{aligned.name} has {a.n_layers} layers and {base.name} {b.n_layers}: no layer of one stands for a layer of the other"
        )
    if a.vocab_size != b.vocab_size or _vocabulary(aligned) != _vocabulary(base):
        raise InputError(
            f"{aligned.name} and {base.name} have different vocabularies, so their next-token distributions cannot be compared; "
            "take models with one vocabulary (their tokenizers may split texts in other ways)"
        )
    if a.d_model != b.d_model and components and not mapped:
        raise InputError(
            f"{aligned.name} is {a.d_model} wide and {base.name} {b.d_model}; fit a map between them with map: linear"
        )
    if neurons and (a.d_model != b.d_model or a.d_mlp != b.d_mlp):
        raise InputError(
            f"{aligned.name} has {a.d_mlp} neurons a layer that write {a.d_model} numbers, {base.name} {b.d_mlp} and {b.d_model}: no neuron of "
            "one stands for a neuron of the other; set neurons: null"
        )


def scan_layers(base: Model, recipe: BiasScanRecipe) -> tuple[int, ...]:
    """The layers that a recipe scans, ascending; InputError where its components are not in the same layers."""
    geometry, layers = base.geometry, tuple[int, ...]()
    for component in recipe.components:
        site = Site.of(component, layers=None if recipe.layers == "all" else recipe.layers)
        having = geometry.layers_of(component)
        chosen = having if site.layers is None else site.layers.resolve(geometry.n_layers, what=f"layer of {site}")
        geometry.require(component, chosen)
        ascending = tuple(sorted(set(chosen)))
        if layers and ascending != layers:
            names = ", ".join(recipe.components)
            raise InputError(f"{names} are not in the same layers of this model; scan one at a time")
        layers = ascending
    if recipe.neurons is not None and isinstance(recipe.neurons.layer, int):
        geometry.require("mlp_neurons", (recipe.neurons.layer,))
    return layers


def _vocabulary(model: Model) -> dict[str, int] | None:
    return None if model.tokenizer is None else dict(model.tokenizer.get_vocab())


def fit_maps(aligned: Model, base: Model, components: Sequence[str]) -> dict[str, Any]:
    """Ridge regression from the aligned model's activations to the base's, one per component and layer, on neutral text.

    Returns ``maps``: slot -> (aligned width + 1, base width), the last row added; ``r2``: component -> variance
    explained by layer on the half of the sentences that a first fit did not see (the maps are then fitted on all);
    ``tokens``: how many tokens were fitted on.
    """
    pairs = [pair_prompts(aligned.encode(text), base.encode(text)) for text in NEUTRAL_SENTENCES]
    slots: dict[Slot, str] = {
        slot_of(component, layer): component
        for component in components
        for layer in base.geometry.layers_of(component)
    }
    there = aligned.engine.record([pair.aligned for pair in pairs], slots, stay=True)
    here = base.engine.record([pair.base for pair in pairs], slots, stay=True)
    rows = np.concatenate([np.full(len(pair.shared), row) for row, pair in enumerate(pairs)])
    at_base = np.concatenate([np.array(pair.shared) for pair in pairs])
    at_aligned = np.concatenate([pair.where[list(pair.shared)] for pair in pairs])
    even = torch.as_tensor(rows % 2 == 0)
    maps: dict[Slot, torch.Tensor] = {}
    r2: dict[str, list[float]] = {component: [] for component in components}
    for slot in sorted(slots):
        x = there.values[slot][rows, at_aligned].double().cpu()
        y = here.values[slot][rows, at_base].double().cpu()
        weights, constant = ridge_regression(x[even], y[even], _RIDGE)
        left = y[~even] - (x[~even] @ weights + constant)
        around = y[~even] - y[even].mean(dim=0)
        r2[slots[slot]].append(1.0 - float(left.pow(2).sum() / around.pow(2).sum()))
        weights, constant = ridge_regression(x, y, _RIDGE)
        maps[slot] = torch.cat([weights, constant[None]]).to(base.runtime.device, torch.float32)
    return {"maps": maps, "r2": r2, "tokens": len(rows)}
