"""Mean activations over a set of prompts, kept: what a mean ablation replaces a site by.

The model: a site's mean over unrelated text carries what the site always says and nothing about the prompt at hand, so
replacing it by its mean removes what it says about the prompt (Wang et al. 2022) without the shock of zero.

``over: tokens`` takes one mean over all tokens of all prompts, ``prompts`` one for each position over prompts of one
length. Sums run in float64. ``std`` beside the mean is the spread over the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.engine.budget import Budget
from nsp.engine.plan import Plan, model_statement
from nsp.engine.recording import recordings
from nsp.engine.schedule import Schedule, estimate_ordinary
from nsp.engine.slots import slot_of
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.labels import index_coord, prompts_dataset
from nsp.experiments.mean_activations.panels import panels
from nsp.experiments.mean_activations.recipe import MeanActivationsRecipe
from nsp.experiments.prompt_options import encode_prompts, prompts_key
from nsp.experiments.registry import Experiment, register
from nsp.experiments.selections import as_list
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.report.summary import Summary, SummaryTable
from nsp.sites import COMPONENTS

KIND = "mean-activations"


class MeanActivationsJob:
    """A run, prepared. One unit of work a component."""

    def __init__(self, model: Model, recipe: MeanActivationsRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.prompts = encode_prompts(model, recipe.prompts if recipe.prompts is not None else NEUTRAL_SENTENCES, recipe.chat)
        lengths = {len(prompt) for prompt in self.prompts}
        if recipe.over == "prompts" and len(lengths) > 1:
            raise InputError(f"over: prompts compares equal positions, so prompts must have one length; got {sorted(lengths)} tokens")
        if min(lengths) <= recipe.drop_first:
            raise InputError(f"a prompt of {min(lengths)} token(s) is left with none when the first {recipe.drop_first} are dropped")
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        self.layers = {name: self._layers(name) for name in recipe.components}

    def _layers(self, name: str) -> tuple[int, ...]:
        if name not in self.model.geometry.components():
            self.model.geometry.where(name)  # says why there is none
        return self.model.geometry.layers_of(name)

    @cached_property
    def plan(self) -> Plan:
        """The plan: token ids, components, over what."""
        statement = {
            "prompts": [list(prompt.token_ids) for prompt in self.prompts],
            "layers": {name: list(layers) for name, layers in self.layers.items()},
            "over": self.recipe.over,
            "drop_first": self.recipe.drop_first,
        }
        model = model_statement(self.model.provenance)
        made = [estimate_ordinary(self.model.runtime, self.prompts, name) for name in self.layers]
        return Plan(KIND, model, statement, Schedule(tuple(made)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One a component."""
        return tuple(Unit(number, {f"activations/{name}": {}}) for number, name in enumerate(self.layers))

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        means = {f"activations/{name}": self._means(name) for name in self.layers}
        return xr.DataTree.from_dict({"inputs": prompts_dataset(self.prompts), **means})

    def _means(self, name: str) -> xr.Dataset:
        dims, shape = ["layer"], [len(self.layers[name])]
        coords: dict[str, Any] = {"layer": index_coord("layer", list(self.layers[name]), "layer")}
        if self.recipe.over == "prompts":
            dims, shape = [*dims, "position"], [*shape, len(self.prompts[0])]
            coords["position"] = index_coord("position", shape[-1], "position")
        units = self.model.runtime.units(name)
        if COMPONENTS[name].has_heads:
            dims, shape = [*dims, "head"], [*shape, units.count]
            coords["head"] = index_coord("head", units.count, "head")
        width = units.width if COMPONENTS[name].has_heads else units.count * units.width
        dims, shape = [*dims, "neuron"], [*shape, width]
        coords["neuron"] = index_coord("neuron", width, "neuron" if COMPONENTS[name].unit == "neuron" else "column")
        first = f", the first {self.recipe.drop_first} of each prompt left out" if self.recipe.drop_first else ""
        what = "over all tokens of all prompts" if self.recipe.over == "tokens" else "over prompts, a position each"
        attrs = {"units": "activation", "method": f"ordinary forward passes, {what}{first}"}
        blank = np.full(shape, np.nan, np.float32)
        meaning = COMPONENTS[name].meaning
        return xr.Dataset(
            {"mean": (dims, blank, {"long_name": f"mean: {meaning}", **attrs}),
             "std": (dims, blank, {"long_name": f"standard deviation: {meaning}", **attrs})},
            coords, {"component": name},
        )  # fmt: skip

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Average one component."""
        path = next(iter(unit.regions))
        name = path.removeprefix("activations/")
        layers, units = self.layers[name], self.model.runtime.units(name)
        own = torch.as_tensor(units.index)
        count, done = 0.0, 0
        shift = total = squared = torch.zeros(0)
        slots = [slot_of(name, layer) for layer in layers]
        for kept in recordings(self.model.runtime, self.prompts, slots, self.budget):
            weight = kept.real.clone()
            weight[:, : self.recipe.drop_first] = False
            parts = []
            for value in (kept.at(name, layer) for layer in layers):
                split = value.double().cpu().reshape(*value.shape[:2], units.rows, units.width)[:, :, own]
                parts.append(split if self.recipe.over == "prompts" else split[weight][:, None])
            taken = torch.stack(parts, dim=2)  # (token or prompt, position, layer, unit, width)
            if not count:
                # Sums of squares of what is far from zero lose their digits; the first batch's mean is near enough.
                shift = taken.mean(dim=0)
                total, squared = torch.zeros_like(shift), torch.zeros_like(shift)
            total = total + (taken - shift).sum(dim=0)
            squared = squared + (taken - shift).pow(2).sum(dim=0)
            count += len(taken)
            done += len(kept.rows)
            if progress is not None:
                progress(done, len(self.prompts))
        mean = total / count
        spread = (squared / count - mean.pow(2)).clamp(min=0).sqrt()
        shape = self._means(name)["mean"].shape

        def stored(made: torch.Tensor) -> np.ndarray:
            # (position, layer, unit, width) to the variable's dims.
            return np.asarray(made.transpose(0, 1).reshape(shape).numpy(), dtype=np.float32)

        return {path: {"mean": stored(mean + shift), "std": stored(spread)}}


def prepare(model: Model, recipe: MeanActivationsRecipe) -> MeanActivationsJob:
    """Check a recipe against a model and describe the run."""
    return MeanActivationsJob(model, recipe)


def mean_activations(
    model: Model,
    prompts: Sequence[Any] | str | Path | None = None,
    *,
    components: str | Sequence[str] = ("mlp_neurons", "z", "resid_post"),
    over: Literal["tokens", "prompts"] = "tokens",
    drop_first: int = 0,
    memory: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> xr.DataTree:
    """Mean activations over prompts (by default nsp's neutral sentences), to ablate with.

    ``nsp.ablate(site, "mean", reference=…)`` takes the path of the store, or one component's means:
    ``tree["activations/mlp_neurons"]["mean"]``.
    """
    recipe = checked(
        MeanActivationsRecipe,
        {
            "kind": KIND,
            "prompts": None if prompts is None else prompts_key(prompts),
            "components": as_list(components),
            "over": over,
            "drop_first": drop_first,
            "memory": memory,
        },
    )
    return runner.results(prepare(model, recipe), out=out, force=force, progress=progress)


def summarise(tree: xr.DataTree) -> Summary:
    """What was averaged, and how large it is."""
    inputs, model = tree["inputs"].to_dataset(), tree.attrs.get("model", {})
    tokens = int(inputs["n_tokens"].sum())
    lines = (
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {inputs.sizes['prompt']} prompts, {tokens} tokens",
        "ablate with it: nsp.ablate(site, 'mean', reference='<this store>')",
    )
    rows = []
    for name, node in tree["activations"].children.items():
        made = node.to_dataset()
        size = " x ".join(f"{length} {dim}" for dim, length in made["mean"].sizes.items())
        rows.append((name, size, float(np.abs(made["mean"]).mean()), float(made["std"].mean())))
    return Summary("mean activations", lines, (SummaryTable("means", ("component", "shape", "mean |mean|", "mean std"), tuple(rows)),))


register(Experiment(KIND, MeanActivationsRecipe, prepare, summarise, panels=panels))
