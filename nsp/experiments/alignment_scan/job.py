"""Alignment scan: which MLP neurons fire on harmful prompts and not on normal ones?

The model: every neuron's value on every prompt of two sets, from one ordinary run a prompt; the store keeps them all,
and what is found is computed from them (`nsp.experiments.alignment_scan.select` says how, and what it is worth).

Cost: one forward pass a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsp.engine.budget import Budget
from nsp.engine.plan import Plan, model_statement
from nsp.engine.schedule import Estimate, Schedule, speed
from nsp.experiments import runner
from nsp.experiments.alignment_scan.panels import alignment_panels
from nsp.experiments.alignment_scan.prompts import AlignmentPrompts, alignment_prompts
from nsp.experiments.alignment_scan.recipe import AlignmentScanRecipe
from nsp.experiments.alignment_scan.select import AlignmentNeurons, neuron_table, select_neurons
from nsp.experiments.job import BranchProgress, Unit, UnitValues, blocks, header_of
from nsp.experiments.labels import index_coord, prompts_dataset, text_array
from nsp.experiments.prompt_activations import prompt_values
from nsp.experiments.registry import Experiment, register
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.report.panels import Drawing
from nsp.report.summary import Summary, SummaryTable

KIND = "alignment-scan"
_BLOCK = 16
GROUP = "activations/mlp_neurons"
_SHOWN = 15


def activation_blank(model: Model, found: AlignmentPrompts) -> xr.Dataset:
    """The template of the activations, dims (prompt, layer, neuron), with labels and replies as coordinates."""
    count, neurons = len(found.prompts), model.geometry.d_mlp
    how = {"last": "at the last token", "mean": "mean over tokens", "max": "maximum over tokens"}[found.options.reduce]
    texts = [prompt.text if prompt.text is not None else "".join(prompt.token_texts) for prompt in found.prompts]
    flag = {"harmful": found.harmful, "held_out": found.held_out}
    words = {"harmful": "1: in the harmful set, 0: in the normal one", "held_out": "1: kept out of the search"}
    coords: dict[str, Any] = {
        "prompt": index_coord("prompt", count, "prompt, from 0"),
        "layer": index_coord("layer", found.layers, "layer"),
        "neuron": index_coord("neuron", neurons, "MLP neuron"),
        "text": xr.Variable(("prompt",), text_array(texts), {"long_name": "prompt"}),
        "reply": xr.Variable(
            ("prompt",), text_array(found.replies), {"long_name": "the model's reply, where it made the label"}
        ),
    }
    coords |= {
        name: xr.Variable(("prompt",), value.astype(np.int8), {"long_name": words[name]})
        for name, value in flag.items()
    }
    options = found.options
    attrs = {
        "sigma": options.sigma, "min_precision": options.min_precision, "level": options.level, "reduce": options.reduce,
        "source": found.source,
    }  # fmt: skip
    value = np.full((count, len(found.layers), neurons), np.nan, dtype=np.float32)
    about = {"long_name": f"value of the neuron, {how}", "units": "activation", "method": "ordinary forward pass"}
    return xr.Dataset({"value": (("prompt", "layer", "neuron"), value, about)}, coords, attrs)


def activation_values(model: Model, found: AlignmentPrompts, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """The activations of some prompts, (prompt, layer, neuron)."""
    prompts, budget = [found.prompts[row] for row in rows], Budget.of(None, model.runtime.device)
    return {"value": prompt_values(model, prompts, "mlp_neurons", found.layers, budget, over=found.options.reduce)}


class AlignmentScanJob:
    """An alignment scan, prepared: both sets read (or derived), every prompt encoded."""

    def __init__(self, model: Model, recipe: AlignmentScanRecipe) -> None:
        self.model, self.recipe = model, recipe
        pairs = recipe.pairs.select(recipe.pairs.read(), recipe.seed) if recipe.auto == "pairs" else ()
        self.prompts = alignment_prompts(model, recipe, pairs, recipe.seed)

    @cached_property
    def plan(self) -> Plan:
        """The plan; its statement is what the recipe comes to."""
        model = model_statement(self.model.provenance)
        runtime, count = self.model.runtime, len(self.prompts.prompts)
        tokens, depth = sum(len(prompt) for prompt in self.prompts.prompts), self.model.geometry.n_layers
        flop = float(tokens) * depth * runtime.cost.per_token
        estimate = Estimate(
            "mlp_neurons, recorded", "plain", "every prompt runs whole, once", count, 0, -(-count // _BLOCK), tokens, tokens * depth,
            tokens * depth, flop, flop, flop / speed(str(runtime.device), runtime.dtype), 200_000_000,
        )  # fmt: skip
        thresholds = {name: getattr(self.recipe, name) for name in ("sigma", "min_precision", "level")}
        return Plan(KIND, model, {**self.prompts.statement(), **thresholds}, Schedule((estimate,)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of prompts."""
        return blocks(len(self.prompts.prompts), _BLOCK, [GROUP])

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        return xr.DataTree.from_dict(
            {"inputs": prompts_dataset(self.prompts.prompts), GROUP: activation_blank(self.model, self.prompts)}
        )

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Run a block of prompts."""
        rows = range(len(self.prompts.prompts))[unit.regions[GROUP]["prompt"]]
        values = activation_values(self.model, self.prompts, rows)
        if progress is not None:
            progress(len(rows), len(rows))
        return {GROUP: values}


def alignment_neurons(tree: xr.DataTree) -> AlignmentNeurons:
    """What a finished scan found, from its store (also the store of a bias scan that had ``alignment``)."""
    dataset = tree[GROUP].to_dataset()
    return select_neurons(
        np.asarray(dataset["value"].values),
        np.asarray(dataset["layer"].values),
        np.asarray(dataset["harmful"].values).astype(bool),
        np.asarray(dataset["held_out"].values).astype(bool),
        sigma=float(dataset.attrs["sigma"]),
        min_precision=float(dataset.attrs["min_precision"]),
        level=float(dataset.attrs["level"]),
    )


def alignment_lines(tree: xr.DataTree, found: AlignmentNeurons) -> list[str]:
    """What a scan found, in sentences."""
    dataset = tree[GROUP].to_dataset()
    one, other = found.searched, found.held
    lines = [
        f"{dataset.attrs['source']}: searched on {one.n_harmful} harmful and {one.n_normal} normal prompts, tried on {other.n_harmful} and "
        f"{other.n_normal} held out",
        f"{len(found.layer)} neurons: {int(found.selected.sum())} selected (precision at least {dataset.attrs['min_precision']:g}, "
        f"Benjamini-Hochberg at {dataset.attrs['level']:g}), {int(found.confirmed.sum())} confirmed on the held-out prompts",
    ]
    if not found.selected.any():
        lines.append("no neuron passes; the table shows those that came nearest")
    return lines


def shown_neurons(found: AlignmentNeurons) -> SummaryTable:
    """The table of a summary: fewer columns and rows than the csv file has."""
    table = neuron_table(found, _SHOWN)
    names = ("layer", "neuron", "precision", "recall", "lift", "q", "held_precision", "held_recall", "confirmed")
    at = [table.columns.index(name) for name in names]
    title = (
        "neurons that fire on harmful prompts" if found.selected.any() else "neurons of least p-value, none selected"
    )
    return SummaryTable(title, names, tuple(tuple(row[place] for place in at) for row in table.rows))


def summarise(tree: xr.DataTree) -> Summary:
    """The selected neurons of a run, from its store."""
    if bool(tree[GROUP]["value"].isnull().any()):
        return Summary("alignment scan", ("the scan is not finished; run the recipe again to go on",))
    found = alignment_neurons(tree)
    model = tree.attrs.get("model", {})
    lines = [f"model {model.get('name', '?')} ({model.get('dtype', '?')})", *alignment_lines(tree, found)]
    return Summary("alignment scan", tuple(lines), (shown_neurons(found),))


def headline(tree: xr.DataTree) -> str:
    """How many neurons were found, for `nsp ls`."""
    found = alignment_neurons(tree)
    return f"{int(found.selected.sum())} of {len(found.layer)} neurons selected, {int(found.confirmed.sum())} confirmed"


def csv_tables(tree: xr.DataTree) -> list[SummaryTable]:
    """The tables of ``nsp export STORE --csv DIR``."""
    return [neuron_table(alignment_neurons(tree))]


def prepare(model: Model, recipe: AlignmentScanRecipe) -> AlignmentScanJob:
    """Check a recipe against a model and describe the run. With ``auto: refusals`` the model answers every prompt here."""
    return AlignmentScanJob(model, recipe)


def alignment_scan(
    model: Model, *, out: str | Path | None = None, force: bool = False, progress: bool | None = None, **keys: Any
) -> xr.DataTree:
    """An alignment scan from Python; ``keys`` are the recipe's (``harmful_txt``, ``normal_txt``, ``auto``, ``sigma``, ...)."""
    recipe = checked(AlignmentScanRecipe, {"kind": KIND, "model": model.name, **keys})
    return runner.results(prepare(model, recipe), out=out, force=force, progress=progress)


def panels(tree: xr.DataTree) -> list[Drawing]:
    """What the HTML report draws."""
    return alignment_panels(alignment_neurons(tree))


register(Experiment(KIND, AlignmentScanRecipe, prepare, summarise, headline, csv_tables, panels=panels))
