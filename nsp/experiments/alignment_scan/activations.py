"""The activations that an alignment scan keeps: every MLP neuron on every prompt, one value per prompt.

A bias scan with ``alignment`` keeps the same group, by the same stage.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from nsp.experiments.alignment_scan.prompts import AlignmentPrompts
from nsp.experiments.experiment import Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, index_coord, prompt_text, text_coord
from nsp.experiments.prompt_activations import prompt_values
from nsp.model import Model

GROUP = "activations/mlp_neurons"
_BLOCK = 16
_REDUCED = {"last": "at the last token", "mean": "mean over tokens", "max": "maximum over tokens"}


def activation_group(model: Model, scanned: AlignmentPrompts) -> Group:
    """The activations before they are known, dims (prompt, layer, neuron); labels and replies are coordinates."""
    options = scanned.options
    flags = {
        "harmful": (scanned.harmful, "1: in the harmful set, 0: in the normal one"),
        "held_out": (scanned.held_out, "1: kept out of the search"),
    }
    coords: Mapping[str, xr.Variable] = {
        "prompt": index_coord("prompt", len(scanned.prompts), "prompt, from 0"),
        "layer": index_coord("layer", scanned.layers, "layer"),
        "neuron": index_coord("neuron", model.geometry.d_mlp, "MLP neuron"),
        "text": text_coord("prompt", [prompt_text(prompt) for prompt in scanned.prompts], "prompt"),
        "reply": text_coord("prompt", scanned.replies, "the model's reply, where it made the label"),
        **{name: xr.Variable(("prompt",), flag.astype(np.int8), {"long_name": text}) for name, (flag, text) in flags.items()},
    }
    attrs = {name: getattr(options, name) for name in ("sigma", "min_precision", "level", "reduce")}
    long_name = f"value of the neuron, {_REDUCED[options.reduce]}"
    value = Variable(("prompt", "layer", "neuron"), long_name, "activation", "ordinary forward pass")
    return Group({"value": value}, coords, {**attrs, "source": scanned.source})


def activation_stage(model: Model, scanned: AlignmentPrompts) -> Stage:
    """Record the neurons, prompts in blocks."""

    def recorded(region: Region, stored: Stored) -> Values:
        prompts = [scanned.prompts[row] for row in region.indices("prompt")]
        reduce, progress = scanned.options.reduce, region.progress
        values = prompt_values(model.engine, prompts, "mlp_neurons", scanned.layers, over=reduce, progress=progress)
        return {GROUP: {"value": values}}

    return Stage(recorded, (GROUP,), {"prompt": _BLOCK})
