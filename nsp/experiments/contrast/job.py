"""Contrast: which neurons, and which direction at each layer, tell two sets of prompts apart?

The model: two sets of prompts that differ in one thing. Each prompt gives one value a unit (at the last position, or
the mean over positions). Units are ranked by the difference of the sets' means with its effect size and a corrected
test (`nsp.experiments.contrast.statistics`); the differences of a layer together are its control vector
(`nsp.experiments.control_vectors`), which is taken apart into MLP neurons (`nsp.experiments.contrast.decomposition`).

Sign: positive minus negative, so adding a control vector moves towards the positive set.

Cost: one ordinary forward pass a prompt and component.

Limits: a difference says that a unit tells the sets apart, not that the model uses it: steer with it and see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.engine.budget import Budget
from nsp.engine.lowering import resolve
from nsp.engine.plan import Plan, model_statement
from nsp.engine.schedule import Schedule, estimate_ordinary
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.circuits import Circuit
from nsp.experiments.contrast.decomposition import compare, comparison_dataset, decompose, decomposition_dataset
from nsp.experiments.contrast.panels import panels
from nsp.experiments.contrast.recipe import ContrastRecipe
from nsp.experiments.contrast.statistics import TestOptions, contrast_statistics
from nsp.experiments.contrast.summary import summarise
from nsp.experiments.contrast.vectors import ControlVectors, separation, vectors_of
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.labels import index_coord, prompts_dataset, text_array
from nsp.experiments.prompt_activations import prompt_values
from nsp.experiments.prompt_options import encode_prompts, prompts_key
from nsp.experiments.registry import Experiment, register
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.sites import Site

KIND = "contrast"
_STEPS = 50  # neurons that a control vector is taken apart into
_SETS = ("positive", "negative")


class ContrastJob:
    """A contrast, prepared: prompts encoded, layers resolved, nothing run yet. One unit of work a component."""

    def __init__(self, model: Model, recipe: ContrastRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.sets = tuple(encode_prompts(model, given, recipe.chat) for given in (recipe.positive, recipe.negative))
        self.options = TestOptions(recipe.paired, recipe.correction, recipe.resamples, recipe.seed)
        if recipe.paired and len(self.sets[0]) != len(self.sets[1]):
            raise InputError(
                f"paired sets have equally many prompts, not {len(self.sets[0])} and {len(self.sets[1])}"
            )
        self.prompts: tuple[Prompt, ...] = (*self.sets[0], *self.sets[1])
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        self.layers: dict[str, tuple[int, ...]] = {
            name: resolve(model.runtime, Site.of(name, recipe.layers), self.prompts).layers for name in recipe.components
        }
        self.circuit = None if recipe.circuit is None else Circuit.load(recipe.circuit)
        if self.circuit is not None and "mlp_neurons" not in model.geometry.components():
            raise InputError(f"{model.name} has no MLP neurons to compare a circuit's with")

    @cached_property
    def plan(self) -> Plan:
        """The plan: token ids, components, layers, and how they are compared."""
        statement = {
            "sets": [[list(prompt.token_ids) for prompt in one] for one in self.sets],
            "layers": {name: list(layers) for name, layers in self.layers.items()},
            "at": self.recipe.at,
            "drop_first": self.recipe.drop_first if self.recipe.at == "mean" else 0,
            "vectors": self.recipe.vectors,
            "test": asdict(self.options),
            "decompose": self.recipe.decompose,
            "circuit": None if self.circuit is None else self.circuit.to_json(),
        }
        model = model_statement(self.model.provenance)
        made = [
            estimate_ordinary(self.model.runtime, self.prompts, name, kept=len(self.prompts) * len(layers) * self._width(name) * 4)
            for name, layers in self.layers.items()
        ]
        return Plan(KIND, model, statement, Schedule(tuple(made)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One a component."""
        return tuple(
            Unit(number, {path: {} for path in self._groups(name)}) for number, name in enumerate(self.recipe.components)
        )

    def _groups(self, name: str) -> dict[str, xr.Dataset]:
        """The groups that one component's unit fills, blank."""
        layers = self.layers[name]
        groups = {f"activations/{name}": self._activations(name), f"attribution/{name}": self._statistics(name)}
        if self._decomposes(name):
            steps = min(_STEPS, self.model.geometry.d_model, self.model.geometry.d_mlp)
            both = np.full((len(layers), self.model.geometry.d_mlp), np.nan, np.float32)
            path = np.full((len(layers), steps), np.nan, np.float32)
            order = np.full(path.shape, -1, np.int64)
            groups[f"attribution/{name}-neurons"] = decomposition_dataset(layers, both, both, order, path, path)
        if self.circuit is not None and self._compares(name):
            groups[f"circuit/{name}"] = _spread(comparison_dataset(layers, np.tile(_BLANK, (len(layers), 1)), _NO_RANK))
        return groups

    def _decomposes(self, name: str) -> bool:
        geometry = self.model.geometry
        plain = "mlp_neurons" in geometry.table.components and geometry.table.components["mlp_neurons"].side == "input"
        return self.recipe.decompose and name != "mlp_neurons" and plain and self._all_have_neurons(name)

    def _compares(self, name: str) -> bool:
        assert self.circuit is not None
        return self._all_have_neurons(name) and any(layer in self.layers[name] for layer in self.circuit.by_layer())

    def _all_have_neurons(self, name: str) -> bool:
        return set(self.layers[name]) <= set(self.model.geometry.layers_of("mlp_neurons"))

    def _width(self, name: str) -> int:
        units = self.model.runtime.units(name)
        return units.rows * units.width

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        tree: dict[str, xr.Dataset] = {"inputs": self._inputs()}
        for name in self.recipe.components:
            tree |= self._groups(name)
        return xr.DataTree.from_dict(tree)

    def _inputs(self) -> xr.Dataset:
        names = [f"{which} {number}" for which, one in zip(_SETS, self.sets, strict=True) for number in range(len(one))]
        found = prompts_dataset(self.prompts, names=names)
        which = text_array([which for which, one in zip(_SETS, self.sets, strict=True) for _ in one])
        how = {"long_name": "set that the prompt belongs to", "units": "1", "method": "given"}
        return found.assign(set=(("prompt",), which, how))

    def _coords(self, name: str) -> dict[str, Any]:
        unit = "neuron" if name == "mlp_neurons" else "column of the component"
        return {
            "layer": index_coord("layer", list(self.layers[name]), "layer"),
            "neuron": index_coord("neuron", self._width(name), unit),
        }

    def _activations(self, name: str) -> xr.Dataset:
        shape = (len(self.prompts), len(self.layers[name]), self._width(name))
        where = "at the last position" if self.recipe.at == "last" else f"mean over positions from {self.recipe.drop_first} on"
        attrs = {"long_name": f"{name}, one value a prompt", "units": "activation", "method": f"ordinary forward pass, {where}"}
        coords = {"prompt": index_coord("prompt", len(self.prompts), "prompt, from 0"), **self._coords(name)}
        return xr.Dataset({"activation": (("prompt", "layer", "neuron"), np.full(shape, np.nan, np.float32), attrs)}, coords)

    def _statistics(self, name: str) -> xr.Dataset:
        both = np.full((len(self.layers[name]), self._width(name)), np.nan, np.float32)
        alone = both[:, 0].copy()
        if self.options.correction in ("bh", "by"):
            test = "Student's t of paired differences" if self.options.paired else "Welch's t"
        else:
            test = "sign flips of paired differences" if self.options.paired else "permutations of the sets, Welch's t"
            test = f"{test}; {self.options.resamples} drawn, seed {self.options.seed}"
        kept = "projection of held-out prompts on the mean difference of the others"
        variables = {
            "difference": (both, "mean of the positive set minus mean of the negative set", "activation", "difference of means"),
            "cohen_d": (both, "difference of means in pooled standard deviations", "1", "Cohen's d"),
            "p": (both, "two-sided p (NaN: not tested)", "1", test),
            "p_corrected": (both, "two-sided p, corrected for all units of the component", "1", f"{test}; {self.options.correction}"),
            "vector": (both, "control vector", "activation", self.recipe.vectors),
            "share": (alone, "share of the paired differences' squared length along the vector (NaN: no pairs)", "1", "projection"),
            "separation": (alone, "Cohen's d of the held-out prompts' scores", "1", kept),
            "right_side": (alone, "share of held-out prompts on the right side of the midpoint", "1", kept),
        }
        made = {
            key: (("layer", "neuron") if data.ndim == 2 else ("layer",), data, {"long_name": text, "units": unit, "method": how})
            for key, (data, text, unit, how) in variables.items()
        }
        return xr.Dataset(made, self._coords(name))

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Run the prompts for one component, compare the sets, make and take apart the vectors."""
        name = next(group for group in unit.regions if group.startswith("activations/")).removeprefix("activations/")
        recipe, layers = self.recipe, self.layers[name]
        found = prompt_values(
            self.model, self.prompts, name, layers, self.budget,
            over="mean" if recipe.at == "mean" else "last", drop_first=recipe.drop_first, progress=progress,
        )  # fmt: skip
        high, low = found[: len(self.sets[0])], found[len(self.sets[0]) :]
        vectors, share = vectors_of(high, low, recipe.vectors)
        d, right = separation(high, low, paired=recipe.paired)
        statistics = {**contrast_statistics(high, low, self.options), "vector": vectors, "share": share}
        statistics |= {"separation": d, "right_side": right}
        made: dict[str, dict[str, np.ndarray]] = {
            f"activations/{name}": {"activation": found},
            f"attribution/{name}": {key: value.astype(np.float32) for key, value in statistics.items()},
        }
        control = ControlVectors(name, layers, vectors, recipe.vectors)
        if f"attribution/{name}-neurons" in unit.regions:
            taken = decompose(self.model, control, steps=_STEPS)
            made[f"attribution/{name}-neurons"] = {str(key): taken[key].values for key in taken.data_vars}
        if f"circuit/{name}" in unit.regions:
            assert self.circuit is not None
            compared = _spread(compare(self.model, self.circuit, control))
            made[f"circuit/{name}"] = {str(key): compared[key].values for key in compared.data_vars}
        return made


_BLANK = (-1.0, -1.0, float("nan"), float("nan"))
_NO_RANK = {"top": -1, "top_overlap": float("nan"), "rank_correlation": float("nan"), "rank_correlation_p": float("nan")}
_RANK_NAMES = {
    "top": "strongest neurons compared",
    "top_overlap": "share of the circuit's strongest neurons among those that the control vectors project on most",
    "rank_correlation": "Spearman correlation of |value| in the circuit with |projection|",
    "rank_correlation_p": "its p",
}


def _spread(compared: xr.Dataset) -> xr.Dataset:
    """A comparison with its whole-circuit numbers as variables, since units of work fill no attributes."""
    way = {"units": "1", "method": "circuit against all layers' control vectors"}
    layers = compared.sizes["layer"]
    extra = {
        name: (("layer",), np.full(layers, compared.attrs[name], np.float64), {"long_name": f"{text} (the same at every layer)", **way})
        for name, text in _RANK_NAMES.items()
    }
    return compared.assign(extra).drop_attrs(deep=False)


def prepare(model: Model, recipe: ContrastRecipe) -> ContrastJob:
    """Check a recipe against a model and describe the run."""
    return ContrastJob(model, recipe)


def contrast(
    model: Model,
    positive: Sequence[Any] | str | Path,
    negative: Sequence[Any] | str | Path,
    *,
    memory: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> xr.DataTree:
    """Contrast two sets of prompts from Python.

    Args:
        positive, negative: the sets: lists of prompts, or files of them.
        options: the recipe's other keys: paired, chat, components, layers, at, drop_first, vectors, correction,
            resamples, decompose, circuit, seed.
        memory: budget, such as ``4GB``.
        out: where to keep the run as a store; None keeps it in memory alone.

    Returns a tree with ``activations/<component>``, ``attribution/<component>`` (difference, cohen_d, p_corrected,
    vector, separation) and ``attribution/<component>-neurons`` (the decomposition); see `control_vectors`.
    """
    sets = {"positive": prompts_key(positive), "negative": prompts_key(negative)}
    recipe = checked(ContrastRecipe, {"kind": KIND, **sets, "memory": memory, **options})
    return runner.results(prepare(model, recipe), out=out, force=force, progress=progress)


def control_vectors(tree: xr.DataTree, component: str = "resid_post", layers: Sequence[int] | None = None) -> ControlVectors:
    """The control vectors of a contrast's results (from `contrast`, or `nsp.open_run(...).tree`)."""
    held = [name for name in tree["attribution"].children if not name.endswith("-neurons")] if "attribution" in tree.children else []
    if component not in held:
        raise InputError(f"these results hold no control vectors of {component}; they have {', '.join(held) or 'none'}")
    vector = tree[f"attribution/{component}"].to_dataset()["vector"].load()
    recipe = tree.attrs.get("recipe_resolved", {})
    name = str(recipe.get("name") or KIND) if isinstance(recipe, Mapping) else KIND
    all_layers = tuple(int(layer) for layer in vector["layer"].values)
    made = ControlVectors(component, all_layers, np.asarray(vector.values, dtype=np.float32), str(vector.attrs["method"]), name)
    return made if layers is None else made.select(layers)


register(Experiment(KIND, ContrastRecipe, prepare, summarise, panels=panels))
