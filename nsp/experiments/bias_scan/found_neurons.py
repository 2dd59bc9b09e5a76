"""The neurons that a bias scan finds: those that remove most divergence, over all prompts on which neurons were patched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr


def found_neurons(effects: xr.Dataset, prompts: int, top: int) -> dict[str, np.ndarray]:
    """The ``top`` neurons, best first: ``layer_of``, ``neuron_of`` and ``removed`` (nats), each with axis (neuron,).

    A neuron's score is the sum of what it removes over the prompts in whose layer it was patched, over all ``prompts`` that
    were drawn. Where fewer than ``top`` remove any, those that add most follow; a neuron without any effect is never found.

    Args:
        effects: the group ``effects/mlp_neurons``, dims (prompt, neuron).
    """
    delta, layer_of = effects["delta_kl"].values.astype(np.float64), effects["neuron_layer"].values
    layers = np.unique(layer_of[layer_of >= 0])
    sums = [-np.nan_to_num(delta[layer_of == layer]).sum(axis=0) for layer in layers]
    removed = np.array(sums).reshape(len(layers), delta.shape[1]) / prompts
    row, neuron = np.nonzero(removed)
    scores = removed[row, neuron]
    best = np.lexsort((-np.abs(scores), scores < 0))[:top]
    return {"layer_of": layers[row[best]], "neuron_of": neuron[best], "removed": scores[best]}


def neurons_by_layer(found: Mapping[Any, Any]) -> dict[int, list[int]]:
    """The neurons of ``circuit/found`` (or of what `found_neurons` gives) by layer, both ascending."""
    layers, neurons = (np.asarray(found[name]) for name in ("layer_of", "neuron_of"))
    known = layers >= 0
    return {int(layer): sorted(neurons[known & (layers == layer)].tolist()) for layer in np.unique(layers[known])}
