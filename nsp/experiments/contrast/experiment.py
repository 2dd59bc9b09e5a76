"""Contrast: which neurons, and which direction at each layer, tell two sets of prompts apart?

The model: two sets of prompts that differ in one thing. Each prompt gives one value for each unit (at the last position,
or the mean over positions). Units are ranked by the difference of the sets' means with its effect size and a corrected
test (`nsp.experiments.contrast.statistics`); the differences of a layer together are its control vector
(`nsp.experiments.contrast.vectors`), which is taken apart into MLP neurons (`nsp.experiments.contrast.decomposition`).

Sign: positive minus negative, so adding a control vector moves towards the positive set.

Cost: one ordinary forward pass for each prompt and component.

Limits: a difference says that a unit tells the sets apart, not that the model uses it: steer with it and see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.engine.estimates import Estimate, estimate_ordinary
from nsp.engine.lowering import resolve
from nsp.errors import InputError
from nsp.experiments.circuits import Circuit
from nsp.experiments.contrast.decomposition import compare, comparison_group, decompose, decomposition_group
from nsp.experiments.contrast.recipe import ContrastRecipe, GivenCircuit
from nsp.experiments.contrast.statistics import TestOptions, contrast_statistics
from nsp.experiments.contrast.vectors import ControlVectors, separation, vectors_of
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, given_variable, index_coord, prompts_dataset, text_array
from nsp.experiments.prompt_activations import prompt_values
from nsp.experiments.prompt_options import encode_prompts
from nsp.sites import Site

_STEPS = 50  # neurons that a control vector is taken apart into


class Contrast(Experiment[ContrastRecipe]):
    """One stage for each component: run the prompts, compare the sets, make the control vectors and take them apart."""

    positional = ("positive", "negative")
    results = (
        "``activations/<component>`` (``activation``, (prompt, layer, neuron)), ``attribution/<component>`` (``difference``, "
        "``cohen_d``, ``p``, ``p_corrected``, ``vector``, (layer, neuron), and ``separation`` on held-out prompts, (layer)), "
        "``attribution/<component>-neurons`` (the decomposition: ``cosine``, ``coefficient``, (layer, neuron), and "
        "``pursuit_neuron``, ``explained``, (layer, step)) and ``circuit/<component>`` (the comparison with a circuit, "
        "(layer)); `nsp.experiments.control_vectors` takes the vectors from it"
    )

    def prepare(self) -> None:
        model, recipe = self.model, self.recipe
        self.positive, self.negative = (
            encode_prompts(model, prompts, recipe.chat) for prompts in (recipe.positive, recipe.negative)
        )
        self.options = TestOptions(recipe.paired, recipe.correction, recipe.resamples, recipe.seed)
        sizes = len(self.positive), len(self.negative)
        if recipe.paired and sizes[0] != sizes[1]:
            raise InputError(f"paired sets have equally many prompts, not {sizes[0]} and {sizes[1]}")
        self.prompts: tuple[Prompt, ...] = (*self.positive, *self.negative)
        self.layers: dict[str, tuple[int, ...]] = {
            name: resolve(model.runtime, Site.of(name, recipe.layers), self.prompts).layers
            for name in recipe.components
        }
        self.circuit = None if recipe.circuit is None else _read_circuit(recipe.circuit)
        if self.circuit is not None and "mlp_neurons" not in model.geometry.components():
            raise InputError(f"{model.name} has no MLP neurons to compare a circuit's with")

    def statement(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "sets": [[list(prompt.token_ids) for prompt in prompts] for prompts in (self.positive, self.negative)],
            "layers": {name: list(layers) for name, layers in self.layers.items()},
            "at": recipe.at,
            "drop_first": recipe.drop_first if recipe.at == "mean" else 0,
            "vectors": recipe.vectors,
            "test": asdict(self.options),
            "decompose": recipe.decompose,
            "circuit": None if self.circuit is None else self.circuit.to_json(),
        }

    def estimates(self) -> Iterator[Estimate]:
        for name, layers in self.layers.items():
            kept = len(self.prompts) * len(layers) * self._width(name) * 4
            yield estimate_ordinary(self.model.runtime, self.prompts, name, kept=kept)

    # --- labels -----------------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, Group | xr.Dataset]:
        return {
            "inputs": self._inputs(),
            **{path: group for name in self.layers for path, group in self._compared(name).items()},
        }

    def _inputs(self) -> xr.Dataset:
        sizes = {"positive": len(self.positive), "negative": len(self.negative)}
        names = [f"{name} {number}" for name, size in sizes.items() for number in range(size)]
        which = text_array([name for name, size in sizes.items() for _ in range(size)])
        belongs = given_variable(("prompt",), which, "set that the prompt belongs to", "given")
        return prompts_dataset(self.prompts, names=names).assign(set=belongs)

    def _compared(self, name: str) -> dict[str, Group]:
        """The groups that one component fills."""
        layers, geometry = self.layers[name], self.model.geometry
        groups = {f"activations/{name}": self._activations(name), f"attribution/{name}": self._statistics(name)}
        have_neurons = set(layers) <= set(geometry.layers_of("mlp_neurons"))
        neurons = geometry.table.components.get("mlp_neurons")
        plain = neurons is not None and neurons.side == "input"
        if self.recipe.decompose and name != "mlp_neurons" and plain and have_neurons:
            steps = min(_STEPS, geometry.d_model, geometry.d_mlp)
            groups[f"attribution/{name}-neurons"] = decomposition_group(layers, geometry.d_mlp, steps)
        if self.circuit is not None and have_neurons and set(self.circuit.by_layer()) & set(layers):
            groups[f"circuit/{name}"] = _stored_comparison(layers)
        return groups

    def _width(self, name: str) -> int:
        units = self.model.runtime.units(name)
        return units.rows * units.width

    def _coords(self, name: str) -> dict[str, xr.Variable]:
        unit = "neuron" if name == "mlp_neurons" else "column of the component"
        return {
            "layer": index_coord("layer", list(self.layers[name]), "layer"),
            "neuron": index_coord("neuron", self._width(name), unit),
        }

    def _activations(self, name: str) -> Group:
        mean = f"mean over positions from {self.recipe.drop_first} on"
        how = f"ordinary forward pass, {'at the last position' if self.recipe.at == 'last' else mean}"
        value = Variable(("prompt", "layer", "neuron"), f"{name}, one value a prompt", "activation", how)
        prompt = index_coord("prompt", len(self.prompts), "prompt, from 0")
        return Group({"activation": value}, {"prompt": prompt, **self._coords(name)})

    def _statistics(self, name: str) -> Group:
        both, alone, options = ("layer", "neuron"), ("layer",), self.options
        if options.correction in ("bh", "by"):
            test = "Student's t of paired differences" if options.paired else "Welch's t"
        else:
            test = "sign flips of paired differences" if options.paired else "permutations of the sets, Welch's t"
            test = f"{test}; {options.resamples} drawn, seed {options.seed}"
        corrected = "two-sided p, corrected for all units of the component"
        share = "share of the paired differences' squared length along the vector (NaN: no pairs)"
        held_out = "projection of held-out prompts on the mean difference of the others"
        variables = {
            "difference": Variable(
                both, "mean of the positive set minus mean of the negative set", "activation", "difference of means"
            ),
            "cohen_d": Variable(both, "difference of means in pooled standard deviations", "1", "Cohen's d"),
            "p": Variable(both, "two-sided p (NaN: not tested)", "1", test),
            "p_corrected": Variable(both, corrected, "1", f"{test}; {options.correction}"),
            "vector": Variable(both, "control vector", "activation", self.recipe.vectors),
            "share": Variable(alone, share, "1", "projection"),
            "separation": Variable(alone, "Cohen's d of the held-out prompts' scores", "1", held_out),
            "right_side": Variable(alone, "share of held-out prompts on the right side of the midpoint", "1", held_out),
        }
        return Group(variables, self._coords(name))

    # --- running ----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        return [Stage(partial(self._compare, name), tuple(self._compared(name))) for name in self.layers]

    def _compare(self, name: str, region: Region, stored: Stored) -> Values:
        """Run the prompts for one component, compare the sets, make and take apart the vectors."""
        recipe, layers = self.recipe, self.layers[name]
        activations = prompt_values(
            self.engine, self.prompts, name, layers,
            over=recipe.at, drop_first=recipe.drop_first, progress=region.progress,
        )  # fmt: skip
        high, low = np.split(activations, [len(self.positive)])
        vectors, share = vectors_of(high, low, recipe.vectors)
        held_out_d, right_side = separation(high, low, paired=recipe.paired)
        statistics = {**contrast_statistics(high, low, self.options), "vector": vectors, "share": share}
        values: dict[str, dict[str, Any]] = {
            f"activations/{name}": {"activation": activations},
            f"attribution/{name}": {**statistics, "separation": held_out_d, "right_side": right_side},
        }
        control = ControlVectors(name, layers, vectors, recipe.vectors)
        groups = self._compared(name)
        if (path := f"attribution/{name}-neurons") in groups:
            values[path] = _arrays(decompose(self.model, control, steps=_STEPS))
        if self.circuit is not None and (path := f"circuit/{name}") in groups:
            compared = compare(self.model, self.circuit, control)
            whole = {key: np.full(len(layers), compared.attrs[key]) for key in _WHOLE_CIRCUIT}
            values[path] = {**_arrays(compared), **whole}
        return values


_WHOLE_CIRCUIT = {
    "top": "strongest neurons compared",
    "top_overlap": "share of the circuit's strongest neurons among those that the control vectors project on most",
    "rank_correlation": "Spearman correlation of |value| in the circuit with |projection|",
    "rank_correlation_p": "its p",
}


def _stored_comparison(layers: Sequence[int]) -> Group:
    """A comparison with its whole-circuit numbers as variables, since units of work fill no attributes."""
    by_layer, way = comparison_group(layers), "circuit against all layers' control vectors"
    whole = {
        name: Variable(("layer",), f"{meaning} (the same at every layer)", "1", way, np.float64)
        for name, meaning in _WHOLE_CIRCUIT.items()
    }
    return Group({**by_layer.variables, **whole}, by_layer.coords)


def _read_circuit(source: str | GivenCircuit) -> Circuit:
    return Circuit.load(source) if isinstance(source, str) else Circuit.from_json(source.given)


def _arrays(dataset: xr.Dataset) -> dict[str, np.ndarray]:
    return {str(name): variable.values for name, variable in dataset.data_vars.items()}
