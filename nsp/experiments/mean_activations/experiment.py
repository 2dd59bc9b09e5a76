"""Mean activations over a set of prompts, kept: what a mean ablation replaces a site by.

The model: a site's mean over unrelated text carries what the site always says and nothing about the prompt at hand, so
replacing it by its mean removes what it says about the prompt (Wang et al. 2022) without the shock of zero.

``over: tokens`` takes one mean over all tokens of all prompts, ``prompts`` one for each position over prompts of one
length. Sums run in float64. ``std`` beside the mean is the spread over the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.engine.estimates import Estimate, estimate_ordinary
from nsp.engine.slots import slot_of
from nsp.errors import InputError
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, index_coord, prompts_dataset
from nsp.experiments.mean_activations.recipe import MeanActivationsRecipe
from nsp.experiments.prompt_options import encode_prompts
from nsp.sites import COMPONENTS


class MeanActivations(Experiment[MeanActivationsRecipe]):
    """Means over prompts. One unit of work for each component."""

    positional = ("prompts",)

    results = (
        "``activations/<component>``: ``mean`` and ``std`` with dims (layer, neuron), with position after layer for means "
        "over prompts, with head before neuron for q, k, v and z; and ``inputs``. ``nsp.ablate(site, 'mean', reference=…)`` "
        "takes the path of the store, or one component's means."
    )

    def prepare(self) -> None:
        recipe = self.recipe
        given = recipe.prompts if recipe.prompts is not None else NEUTRAL_SENTENCES
        self.prompts = encode_prompts(self.model, given, recipe.chat)
        lengths = {len(prompt) for prompt in self.prompts}
        if recipe.over == "prompts" and len(lengths) > 1:
            raise InputError(
                f"over: prompts compares equal positions, so prompts must have one length; got {sorted(lengths)} tokens"
            )
        if min(lengths) <= recipe.drop_first:
            raise InputError(
                f"a prompt of {min(lengths)} token(s) is left with none when the first {recipe.drop_first} are dropped"
            )
        self.layers = {name: self._layers(name) for name in recipe.components}

    def _layers(self, name: str) -> tuple[int, ...]:
        if name not in self.model.geometry.components():
            self.model.geometry.where(name)  # says why there is none
        return self.model.geometry.layers_of(name)

    def statement(self) -> dict[str, Any]:
        return {
            "prompts": [list(prompt.token_ids) for prompt in self.prompts],
            "layers": {name: list(layers) for name, layers in self.layers.items()},
            "over": self.recipe.over,
            "drop_first": self.recipe.drop_first,
        }

    def estimates(self) -> Iterable[Estimate]:
        return [estimate_ordinary(self.model.runtime, self.prompts, name) for name in self.layers]

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        means = {f"activations/{name}": self._group(name) for name in self.layers}
        return {"inputs": prompts_dataset(self.prompts), **means}

    def _group(self, name: str) -> Group:
        component, units = COMPONENTS[name], self.model.runtime.units(name)
        coords = {"layer": index_coord("layer", list(self.layers[name]), "layer")}
        if self.recipe.over == "prompts":
            coords["position"] = index_coord("position", len(self.prompts[0]), "position")
        if component.has_heads:
            coords["head"] = index_coord("head", units.count, "head")
        width = units.width if component.has_heads else units.count * units.width
        coords["neuron"] = index_coord("neuron", width, "neuron" if component.unit == "neuron" else "column")
        first = f", the first {self.recipe.drop_first} of each prompt left out" if self.recipe.drop_first else ""
        what = "over all tokens of all prompts" if self.recipe.over == "tokens" else "over prompts, a position each"
        method, dims = f"ordinary forward passes, {what}{first}", tuple(coords)
        variables = {
            "mean": Variable(dims, f"mean: {component.meaning}", "activation", method),
            "std": Variable(dims, f"standard deviation: {component.meaning}", "activation", method),
        }
        return Group(variables, coords, {"component": name})

    def stages(self) -> Sequence[Stage]:
        return [Stage(partial(self._average, name), (f"activations/{name}",)) for name in self.layers]

    def _average(self, name: str, region: Region, stored: Stored) -> Values:
        layers, units = self.layers[name], self.model.runtime.units(name)
        own = torch.as_tensor(units.index)
        count, done = 0.0, 0
        shift = total = squared = torch.zeros(0)
        for kept in self.engine.recordings(self.prompts, [slot_of(name, layer) for layer in layers]):
            counted = kept.real.clone()
            counted[:, : self.recipe.drop_first] = False
            parts = []
            for layer in layers:
                value = kept.at(name, layer)
                split = value.double().cpu().reshape(*value.shape[:2], units.rows, units.width)[:, :, own]
                parts.append(split if self.recipe.over == "prompts" else split[counted][:, None])
            taken = torch.stack(parts, dim=2)  # (token or prompt, position, layer, unit, width)
            if not count:
                # Sums of squares of what is far from zero lose their digits; the first batch's mean is near enough.
                shift = taken.mean(dim=0)
                total, squared = torch.zeros_like(shift), torch.zeros_like(shift)
            total = total + (taken - shift).sum(dim=0)
            squared = squared + (taken - shift).pow(2).sum(dim=0)
            count += len(taken)
            done += len(kept.rows)
            if region.progress is not None:
                region.progress(done, len(self.prompts))
        mean = total / count
        spread = (squared / count - mean.pow(2)).clamp(min=0).sqrt()
        path = f"activations/{name}"
        shape = self.blanks[path]["mean"].shape

        def laid_out(values: torch.Tensor) -> np.ndarray:
            # (position, layer, unit, width) to the variable's dims.
            return np.asarray(values.transpose(0, 1).reshape(shape).numpy())

        return {path: {"mean": laid_out(mean + shift), "std": laid_out(spread)}}
