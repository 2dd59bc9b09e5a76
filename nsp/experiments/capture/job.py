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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.engine.budget import Budget
from nsp.engine.plan import Plan, model_statement
from nsp.engine.recording import record
from nsp.engine.schedule import Schedule, estimate_ordinary
from nsp.engine.slots import Slot, slot_of
from nsp.experiments import runner
from nsp.experiments.capture.panels import panels
from nsp.experiments.capture.recipe import CaptureRecipe
from nsp.experiments.capture.summary import summarise
from nsp.experiments.job import BranchProgress, Unit, UnitValues, blocks, header_of
from nsp.experiments.labels import index_coord, prompts_dataset
from nsp.experiments.prompt_options import encode_prompts, prompts_key
from nsp.experiments.registry import Experiment, register
from nsp.experiments.selections import as_list
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.sites import COMPONENTS, Selection

KIND = "capture"
# Bytes of one unit of work: what is held at a time, and what is lost at most when a run is killed.
_UNIT_BYTES = 64_000_000


class CaptureJob:
    """A capture, prepared: every prompt encoded, nothing run yet. One unit of work a block of prompts."""

    def __init__(self, model: Model, recipe: CaptureRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.prompts = tuple(_cut(prompt, recipe.max_tokens) for prompt in encode_prompts(model, recipe.prompts, recipe.chat))
        self.longest = max(map(len, self.prompts))
        self.layers = {name: self._layers(name) for name in recipe.components}
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)

    def _layers(self, name: str) -> tuple[int, ...]:
        geometry = self.model.geometry
        if name not in geometry.components():
            geometry.where(name)  # says why there is none
        if self.recipe.layers == "all":
            return geometry.layers_of(name)
        chosen = Selection.of(self.recipe.layers)
        layers = chosen.resolve(geometry.n_layers, what=f"layer of {name}")
        geometry.require(name, layers)
        return layers

    @cached_property
    def plan(self) -> Plan:
        """The plan: token ids, components, layers, and whether values are kept."""
        statement = {
            "prompts": [list(prompt.token_ids) for prompt in self.prompts],
            "layers": {name: list(layers) for name, layers in self.layers.items()},
            "keep": self.recipe.keep,
        }
        model = model_statement(self.model.provenance)
        kept = self.block * self._prompt_bytes
        made = estimate_ordinary(self.model.runtime, self.prompts, ", ".join(self.layers), kept=kept)
        return Plan(KIND, model, statement, Schedule((made,)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def _prompt_bytes(self) -> int:
        width = 0
        for name, layers in self.layers.items():
            units = self.model.runtime.units(name)
            width += len(layers) * units.count * units.width
        return width * self.longest * 4

    @cached_property
    def block(self) -> int:
        """Prompts of one unit of work."""
        return max(1, min(len(self.prompts), _UNIT_BYTES // self._prompt_bytes))

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of prompts, the same for the same plan on every machine."""
        return blocks(len(self.prompts), self.block, (f"activations/{name}" for name in self.layers))

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; values blank."""
        groups = {f"activations/{name}": self._group(name) for name in self.layers}
        return xr.DataTree.from_dict({"inputs": prompts_dataset(self.prompts), **groups})

    def _shape(self, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Dims and sizes of a component's columns."""
        units = self.model.runtime.units(name)
        if COMPONENTS[name].has_heads:
            return ("head", "neuron"), (units.count, units.width)
        return ("neuron",), (units.count * units.width,)

    def _group(self, name: str) -> xr.Dataset:
        dims, sizes = self._shape(name)
        count = len(self.prompts)
        meaning = COMPONENTS[name].meaning
        how = {"method": "one ordinary forward pass a prompt"}
        value = ("prompt", "layer", "position", *dims), (count, len(self.layers[name]), self.longest, *sizes)
        summed = ("prompt", "layer", *dims), (count, len(self.layers[name]), *sizes)
        blank = np.float32(np.nan)
        variables: dict[str, Any] = {}
        if self.recipe.keep == "values":
            attrs = {"long_name": f"{meaning} (NaN beyond the prompt)", "units": "activation", **how}
            variables["value"] = (value[0], np.broadcast_to(blank, value[1]), attrs)
        for variable, text in (("max", "maximum over the prompt's tokens"), ("mean", "mean over the prompt's tokens")):
            attrs = {"long_name": f"{text}: {meaning}", "units": "activation", **how}
            variables[variable] = (summed[0], np.broadcast_to(blank, summed[1]), attrs)
        attrs = {"long_name": f"mean square over the prompt's tokens: {meaning}", "units": "activation^2", **how}
        # The squares of a large model's activations are beyond what float16 holds, whatever dtype the values are kept in.
        variables["mean_square"] = (summed[0], np.broadcast_to(blank, summed[1]), attrs, {"dtype": "float32"})
        attrs = {"long_name": "position of the maximum (-1: not computed)", "units": "1", **how}
        variables["max_position"] = (summed[0], np.broadcast_to(np.int32(-1), summed[1]), attrs)
        coords = {
            "prompt": index_coord("prompt", count, "prompt, from 0"),
            "layer": index_coord("layer", list(self.layers[name]), "layer"),
            "position": index_coord("position", self.longest, "position"),
        }
        if self.recipe.keep != "values":
            del coords["position"]
        coords |= {dim: index_coord(dim, size, dim) for dim, size in zip(dims, sizes, strict=True)}
        return xr.Dataset(variables, coords, {"component": name})

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Run one block of prompts."""
        rows = range(len(self.prompts))[next(iter(unit.regions.values()))["prompt"]]
        runtime = self.model.runtime
        slots: dict[tuple[str, int], Slot] = {
            (name, layer): slot_of(name, layer) for name, layers in self.layers.items() for layer in layers
        }
        lengths = [len(self.prompts[row]) for row in rows]
        most = max(lengths) * self.budget.plain_rows(runtime, max(lengths))
        kept = record(runtime, [self.prompts[row] for row in rows], slots.values(), max_tokens=most)
        real = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, layers in self.layers.items():
            _, sizes = self._shape(name)
            found[f"activations/{name}"] = self._arrays(
                name, [kept.values[slots[name, layer]] for layer in layers], real, sizes
            )
        if progress is not None:
            progress(len(rows), len(self.prompts))
        return found

    def _arrays(
        self, name: str, values: Sequence[torch.Tensor], real: torch.Tensor, sizes: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """The variables of one block: ``values`` holds a tensor (row, position, width) a layer."""
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
        made = {
            "max": peak,
            "max_position": place.to(torch.int32),
            "mean": some.sum(dim=2) / tokens,
            "mean_square": some.square().sum(dim=2) / tokens,
        }
        if self.recipe.keep == "values":
            made["value"] = stacked
        return {variable: np.asarray(tensor.numpy()) for variable, tensor in made.items()}


def _cut(prompt: Prompt, most: int | None) -> Prompt:
    if most is None or len(prompt) <= most:
        return prompt
    spans = tuple((name, tuple(at for at in places if at < most)) for name, places in prompt.spans)
    offsets = None if prompt.offsets is None else prompt.offsets[:most]
    return replace(
        prompt, token_ids=prompt.token_ids[:most], token_texts=prompt.token_texts[:most], offsets=offsets, spans=spans
    )


def prepare(model: Model, recipe: CaptureRecipe) -> CaptureJob:
    """Check a recipe against a model and describe the run."""
    return CaptureJob(model, recipe)


def capture(
    model: Model,
    prompts: Sequence[Any] | str | Path,
    *,
    components: str | Sequence[str] = ("mlp_neurons",),
    layers: Any = "all",
    keep: Literal["values", "summary"] = "values",
    max_tokens: int | None = None,
    store_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    memory: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> xr.DataTree:
    """Capture activations from Python: the recipe's keys as arguments; ``prompts`` are a list, or a file.

    Returns a tree with ``activations/<component>`` (``value`` with dims (prompt, layer, position, neuron), or head and
    neuron for q, k, v and z; ``max``, ``max_position``, ``mean``, ``mean_square`` without position) and ``inputs``.
    """
    recipe = checked(
        CaptureRecipe,
        {
            "kind": KIND,
            "prompts": prompts_key(prompts),
            "components": as_list(components),
            "layers": layers,
            "keep": keep,
            "max_tokens": max_tokens,
            "memory": memory,
        },
    )
    return runner.results(prepare(model, recipe), out=out, force=force, progress=progress, store_dtype=store_dtype)


register(Experiment(KIND, CaptureRecipe, prepare, summarise, panels=panels))
