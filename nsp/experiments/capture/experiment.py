"""Capture: what does each neuron (or head, or column of the stream) hold on these prompts?

The model: one ordinary forward pass a prompt; the values of the chosen components go to the store as
layer x position x neuron, prompt after prompt, never all of them in memory. Beside them stand, for each prompt, the
maximum over its tokens and where it is, the mean, and the mean square: enough for the top-activating examples of every
neuron and for its mean and spread over all tokens, without the values being read again.

Cost: the forward pass, and the writing (see ``benchmarks/stores.py``). ``keep: summary`` leaves the values out, which a
large prompt file needs: 1000 prompts of 64 tokens are 12 GB of smollm2's neurons, and 0.7 GB of summaries.

Limits: activations say what a unit holds, not what it does; that takes an intervention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.engine.estimates import Estimate, estimate_ordinary
from nsp.engine.slots import slot_of
from nsp.experiments.capture.recipe import CaptureRecipe
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, index_coord, prompts_dataset
from nsp.experiments.prompt_options import encode_prompts
from nsp.sites import COMPONENTS, Selection

# Bytes of one unit of work: what is held at a time, and what is lost at most when a run is killed.
_UNIT_BYTES = 64_000_000


class Capture(Experiment[CaptureRecipe]):
    """A capture: every prompt encoded. One unit of work for each block of prompts."""

    results = (
        "``activations/<component>``: ``value`` with dims (prompt, layer, position, neuron), or head and neuron for q, k, v "
        "and z; ``max``, ``max_position``, ``mean``, ``mean_square`` without position; and ``inputs``."
    )

    def prepare(self) -> None:
        recipe = self.recipe
        prompts = encode_prompts(self.model, recipe.prompts, recipe.chat)
        self.prompts = tuple(_cut(prompt, recipe.max_tokens) for prompt in prompts)
        self.longest = max(map(len, self.prompts))
        self.layers = {name: self._layers(name) for name in recipe.components}

    def _layers(self, name: str) -> tuple[int, ...]:
        geometry = self.model.geometry
        if name not in geometry.components():
            geometry.where(name)  # says why there is none
        if self.recipe.layers == "all":
            return geometry.layers_of(name)
        layers = Selection.of(self.recipe.layers).resolve(geometry.n_layers, what=f"layer of {name}")
        geometry.require(name, layers)
        return layers

    def statement(self) -> dict[str, Any]:
        return {
            "prompts": [list(prompt.token_ids) for prompt in self.prompts],
            "layers": {name: list(layers) for name, layers in self.layers.items()},
            "keep": self.recipe.keep,
        }

    def estimates(self) -> Iterable[Estimate]:
        kept = self.block * self._prompt_bytes
        yield estimate_ordinary(self.model.runtime, self.prompts, ", ".join(self.layers), kept=kept)

    @cached_property
    def _prompt_bytes(self) -> int:
        columns = (len(layers) * int(np.prod(list(self._columns(name).values()))) for name, layers in self.layers.items())
        return sum(columns) * self.longest * 4

    @cached_property
    def block(self) -> int:
        """Prompts of one unit of work."""
        return max(1, min(len(self.prompts), _UNIT_BYTES // self._prompt_bytes))

    def _columns(self, name: str) -> dict[str, int]:
        """The dims of a component's columns, with their lengths."""
        units = self.model.runtime.units(name)
        if COMPONENTS[name].unit == "head":
            return {"head": units.count, "neuron": units.width}
        return {"neuron": units.count * units.width}

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        groups = {f"activations/{name}": self._group(name) for name in self.layers}
        return {"inputs": prompts_dataset(self.prompts), **groups}

    def _group(self, name: str) -> Group:
        columns, meaning, how = self._columns(name), COMPONENTS[name].meaning, "one ordinary forward pass a prompt"
        dims = ("prompt", "layer", *columns)
        variables = {
            "max": Variable(dims, f"maximum over the prompt's tokens: {meaning}", "activation", how),
            "mean": Variable(dims, f"mean over the prompt's tokens: {meaning}", "activation", how),
            # The squares of a large model's activations are beyond what float16 holds, whatever dtype the values are
            # kept in.
            "mean_square": Variable(
                dims, f"mean square over the prompt's tokens: {meaning}", "activation^2", how, store_dtype="float32"
            ),
            "max_position": Variable(dims, "position of the maximum (-1: not computed)", "1", how, np.int32),
        }
        coords = {
            "prompt": index_coord("prompt", len(self.prompts), "prompt, from 0"),
            "layer": index_coord("layer", list(self.layers[name]), "layer"),
        }
        if self.recipe.keep == "values":
            every = ("prompt", "layer", "position", *columns)
            variables["value"] = Variable(every, f"{meaning} (NaN beyond the prompt)", "activation", how)
            coords["position"] = index_coord("position", self.longest, "position")
        coords |= {dim: index_coord(dim, size, dim) for dim, size in columns.items()}
        return Group(variables, coords, {"component": name})

    def stages(self) -> Sequence[Stage]:
        groups = tuple(f"activations/{name}" for name in self.layers)
        return [Stage(self._record, groups, split={"prompt": self.block})]

    def _record(self, region: Region, stored: Stored) -> Values:
        prompts = [self.prompts[row] for row in region.indices("prompt")]
        slots = [slot_of(name, layer) for name, layers in self.layers.items() for layer in layers]
        kept = self.engine.record(prompts, slots)
        if region.progress is not None:
            region.progress(len(prompts), len(self.prompts))
        return {
            f"activations/{name}": self._arrays(name, [kept.at(name, layer) for layer in layers], kept.real)
            for name, layers in self.layers.items()
        }

    def _arrays(
        self, name: str, values: Sequence[torch.Tensor], real: torch.Tensor
    ) -> dict[str, np.ndarray]:
        """The variables of one block: ``values`` holds a tensor (row, position, width) for each layer."""
        sizes = tuple(self._columns(name).values())
        units = self.model.runtime.units(name)
        count, longest = real.shape
        own = None if units.count == units.rows else torch.as_tensor(units.index)
        stacked = torch.full((count, len(values), self.longest, *sizes), float("nan"))
        for number, value in enumerate(values):
            split = value if own is None else value.reshape(count, longest, units.rows, units.width)[:, :, own]
            stacked[:, number, :longest] = split.reshape(count, longest, *sizes).cpu().float()
        beyond = torch.ones(count, self.longest, dtype=torch.bool)
        beyond[:, :longest] = ~real
        blank = beyond[:, None, :, None] if len(sizes) == 1 else beyond[:, None, :, None, None]
        padded = bool(beyond.any())
        if padded:
            stacked.masked_fill_(blank, float("nan"))
        peak, place = (stacked.masked_fill(blank, float("-inf")) if padded else stacked).max(dim=2)
        some = torch.nan_to_num(stacked) if padded else stacked
        tokens = real.sum(dim=1).reshape(-1, 1, *(1 for _ in sizes))
        results = {
            "max": peak,
            "max_position": place.to(torch.int32),
            "mean": some.sum(dim=2) / tokens,
            "mean_square": some.square().sum(dim=2) / tokens,
        }
        if self.recipe.keep == "values":
            results["value"] = stacked
        return {variable: np.asarray(tensor.numpy()) for variable, tensor in results.items()}


def _cut(prompt: Prompt, most: int | None) -> Prompt:
    if most is None or len(prompt) <= most:
        return prompt
    spans = tuple((name, tuple(at for at in places if at < most)) for name, places in prompt.spans)
    offsets = None if prompt.offsets is None else prompt.offsets[:most]
    return replace(
        prompt, token_ids=prompt.token_ids[:most], token_texts=prompt.token_texts[:most], offsets=offsets, spans=spans
    )
