"""Causal tracing: which states carry a fact from its subject to the answer?

The model completes a prompt about a subject ("The Eiffel Tower is located in the city of" -> " Paris"). Gaussian noise on
the embeddings of the subject's tokens destroys the answer; then one state of the clean run is put back (the residual
stream of one layer and token, or the attention or MLP outputs of a window of layers at one token), and what comes back
of the answer is that state's *indirect effect*. Meng et al. 2022, "Locating and Editing Factual Associations in GPT".

    total effect     TE(fact)     = m(clean) - mean over draws of m(corrupted)
    indirect effect  IE(fact, s)  = mean over draws of [m(corrupted, s restored) - m(corrupted)]

Noise: standard deviation 3 times that of the token embedding, drawn anew for every fact and draw from a seed.

Cost: one counterfactual a fact, draw and state, run by the engine's branch path from the corrupted run as trunk.

Limits: noise takes the model off its distribution, and how much depends on its scale; a window of attention or MLP
outputs that is restored can also bring back what other layers would have read. An indirect effect says that a state is
enough to bring the answer back, not that the model needs it. Zhang and Nanda 2023; Hase et al. 2023.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.facts import EncodedFact, encode_fact, roles
from nsp.engine.branches import Bases
from nsp.engine.budget import Budget
from nsp.engine.estimates import Estimate, Schedule
from nsp.engine.plan import Plan, model_statement
from nsp.engine.selfcheck import ensure_checked
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.causal_tracing.panels import panels
from nsp.experiments.causal_tracing.recipe import CausalTracingRecipe, FactsSet
from nsp.experiments.causal_tracing.runs import (
    CorruptedRuns,
    Restored,
    Rows,
    Traced,
    corrupted_bases,
    ranks,
    restore_branches,
    subject_deviation,
)
from nsp.experiments.causal_tracing.summary import summarise
from nsp.experiments.job import BranchProgress, Unit, UnitValues, blocks, header_of, warn_nonfinite
from nsp.experiments.labels import index_coord, prompts_dataset, text_array
from nsp.experiments.registry import Experiment, register
from nsp.experiments.selections import as_list
from nsp.metrics import METRICS
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.results import position_coords
from nsp.sites import Selection

KIND = "causal-tracing"
# One unit of work: what is lost at most when a run is killed.
_UNIT_FLOP = 4e12
# A scale smaller than this is none to normalise by.
_TINY = 1e-6


class TracingJob:
    """A causal-tracing run, prepared: facts encoded and tried, noise seeded, nothing restored yet."""

    def __init__(self, model: Model, recipe: CausalTracingRecipe) -> None:
        self.model, self.recipe, self.metrics = model, recipe, recipe.metrics()
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        ensure_checked(model.runtime)
        self.left_out: list[str] = []
        self.facts = self._facts()
        noise = recipe.noise
        unit = subject_deviation(model.runtime, self.facts) if noise.of == "subjects" else 1.0
        seeds = [[noise_seed(recipe.seed, fact, draw) for draw in range(noise.draws)] for fact in self.facts]
        self.rows = Rows(self.facts, np.array(seeds), noise.scale * unit)
        self.restored = tuple(self._restored(component) for component in recipe.components)
        self.positions = [fact.prompt.positions(self._selection) for fact in self.facts]
        self.estimates = [self._estimate(what) for what in self.restored]

    # --- description ------------------------------------------------------------------------------------------------

    def _facts(self) -> tuple[EncodedFact, ...]:
        """The facts that are traced; those that cannot be are named in ``left_out``."""
        facts = [encode_fact(self.model.tokenizer, fact) for fact in self.recipe.read_facts()]
        for fact in facts:
            if len(fact.prompt.span("subject")) == len(fact.prompt):
                raise InputError(f"{fact.fact.label()}: the subject is the whole prompt, so nothing follows it")
        if self.recipe.known_only:
            found = ranks(self.model.runtime, facts, self.budget)
            self.left_out = [fact.fact.prompt for fact, rank in zip(facts, found, strict=True) if rank > 0]
            facts = [fact for fact, rank in zip(facts, found, strict=True) if rank == 0]
            if not facts:
                raise InputError(
                    f"the model knows none of the {len(self.left_out)} facts: no answer is its most likely next token; "
                    "give other facts, or known_only: false"
                )
        limit = self.recipe.limit
        if isinstance(self.recipe.facts, FactsSet) and limit is not None and limit > len(facts):
            known = f" that {self.model.name} knows" if self.recipe.known_only else ""
            raise InputError(f"limit: the set {self.recipe.facts.set!r} has {len(facts)} facts{known}, not {limit}")
        return tuple(facts[:limit])

    @property
    def _selection(self) -> Selection:
        return Selection.of(self.recipe.positions)

    def _restored(self, component: str) -> Restored:
        geometry = self.model.geometry
        having = geometry.layers_of(component)
        geometry.require(component, ())
        if component != "resid_post":
            geometry.where(component)
        selection = Selection.of(self.recipe.layers)
        layers = having if selection.everything else selection.resolve(geometry.n_layers, what=f"layer of {component}")
        geometry.require(component, tuple(layers))
        return Restored(component, tuple(layers), self.recipe.width(component), self._selection)

    def _estimate(self, what: Restored) -> Estimate:
        having = self.model.geometry.layers_of(what.component)
        branches, _ = restore_branches(self._bases, self.rows, what, having)
        together = 2 * self._block * self.rows.draws
        return self.model.engine.within(self.recipe.memory_bytes).estimate(branches, f"restore {_title(what)}", together=together)

    @cached_property
    def _bases(self) -> Bases:
        return corrupted_bases(self.model.runtime, self.rows, self.metrics, self.recipe.components)

    @cached_property
    def plan(self) -> Plan:
        """The plan: facts as token ids, seeds, what is restored, metrics."""
        facts = [
            {"prompt": list(fact.prompt.token_ids), "subject": list(fact.prompt.span("subject")), "answer": fact.answer}
            for fact in self.facts
        ]
        restored = [
            {"component": what.component, "layers": list(what.layers), "window": what.window} for what in self.restored
        ]
        statement = {
            "facts": facts,
            "noise": {"scale": self.rows.scale, "seeds": self.rows.seeds.tolist()},
            "restored": restored,
            "positions": [list(positions) for positions in self.positions],
            "metrics": [metric.to_dict() for metric in self.metrics],
        }
        return Plan(KIND, model_statement(self.model.provenance), statement, Schedule(tuple(self.estimates)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def _block(self) -> int:
        """Facts of one unit of work, the same for the same plan on every machine."""
        longest = max(map(len, self.rows.prompts))
        cells = self.rows.draws * longest * sum(len(what.layers) for what in self.restored)
        each = cells * longest * self.model.geometry.n_layers / 4 * self.model.runtime.cost.per_token
        return max(1, min(len(self.facts), int(_UNIT_FLOP / max(1.0, each))))

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of facts."""
        groups = ["baseline", *(f"{top}/{what.component}" for what in self.restored for top in ("effects", "receipts"))]
        return blocks(len(self.facts), self._block, groups)

    # --- the store ---------------------------------------------------------------------------------------------------

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        tree = {"inputs": self._inputs(), "baseline": self._baseline()}
        for what in self.restored:
            tree[f"effects/{what.component}"] = self._effects(what)
            tree[f"receipts/{what.component}"] = self._receipts(what)
        return xr.DataTree.from_dict(tree)

    def _shape(self, what: Restored) -> tuple[int, int, int]:
        return len(self.facts), len(what.layers), max(map(len, self.positions))

    def _coords(self, what: Restored) -> dict[str, Any]:
        name = "layer" if what.window == 1 else f"centre of {what.window} layers"
        prompts = [fact.prompt for fact in self.facts]
        return {
            "prompt": index_coord("prompt", len(self.facts), "fact, from 0"),
            "layer": index_coord("layer", what.layers, name),
            **position_coords(self.positions, prompts, "prompt"),
        }

    def _effects(self, what: Restored) -> xr.Dataset:
        dims = ("prompt", "layer", "position")
        blank = np.full(self._shape(what), np.nan, dtype=np.float32)
        method = f"{_title(what)} restored from the clean run under noise on the subject, mean over {self.rows.draws} draws"
        variables: dict[str, Any] = {}
        for metric, stem in zip(self.metrics, _stems(self.metrics), strict=True):
            kind = METRICS[metric.kind]
            variables[metric.name] = (dims, blank, {"long_name": kind.long_name, "units": kind.units, "method": method})
            variables[f"indirect_effect{stem}"] = (dims, blank, {
                "long_name": f"indirect effect on {metric.name}: restored - corrupted", "units": kind.units, "method": method})
            variables[f"indirect_effect_sd{stem}"] = (dims, blank, {
                "long_name": f"standard deviation of the indirect effect on {metric.name} over draws of noise",
                "units": kind.units, "method": method})
            variables[f"effect{stem}"] = (dims, blank, {
                "long_name": f"share of the total effect on {metric.name} that comes back: 0 corrupted, 1 clean", "units": "1",
                "method": f"(restored - corrupted) / (clean - corrupted); {method}"})  # fmt: skip
        return xr.Dataset(variables, self._coords(what), {"component": what.component, "window": what.window})

    def _receipts(self, what: Restored) -> xr.Dataset:
        dims, shape = ("prompt", "layer", "position"), self._shape(what)
        how = {"method": f"reported by the engine, {self.estimates[0].path} path"}
        variables = {
            "change_norm": (dims, np.full(shape, np.nan, dtype=np.float32), {
                "long_name": "L2 norm of what restoring changed at its sites, mean over draws", "units": "activation", **how}),
            "fired": (dims, np.full(shape, -1, dtype=np.int32), {
                "long_name": "writes made over all draws (0: effect exactly zero by construction; -1: not computed)",
                "units": "1", **how}),
        }  # fmt: skip
        attrs = {"path": self.estimates[0].path, "path_reason": self.estimates[0].reason}
        return xr.Dataset(variables, self._coords(what), attrs)

    def _baseline(self) -> xr.Dataset:
        blank = np.full(len(self.facts), np.nan, dtype=np.float32)
        variables: dict[str, Any] = {}
        runs = {
            "clean": "clean run",
            "corrupted": "corrupted runs, mean over draws",
            "corrupted_sd": "corrupted runs, standard deviation over draws",
        }
        for metric in self.metrics:
            kind = METRICS[metric.kind]
            for run, words in runs.items():
                attrs = {"long_name": f"{kind.long_name}, {words}", "units": kind.units, "method": "full forward pass"}
                variables[f"{metric.name}_{run}"] = (("prompt",), blank, attrs)
        return xr.Dataset(variables, {"prompt": index_coord("prompt", len(self.facts), "fact, from 0")})

    def _inputs(self) -> xr.Dataset:
        prompts = [fact.prompt for fact in self.facts]
        dataset = prompts_dataset(prompts, names=[fact.fact.subject for fact in self.facts])
        given = {"units": "1", "method": "given, encoded by the model's tokenizer"}
        width = dataset.sizes["position"]
        role = np.full((len(prompts), width), "", dtype=object)
        for row, prompt in enumerate(prompts):
            role[row, : len(prompt)] = list(roles(prompt))
        answers = np.array([fact.answer for fact in self.facts], dtype=np.int64)
        dataset["subject"] = (("prompt",), text_array([f.fact.subject for f in self.facts]), {"long_name": "subject", **given})
        dataset["answer"] = (("prompt",), text_array([f.fact.answer for f in self.facts]), {"long_name": "answer", **given})
        dataset["answer_id"] = (("prompt",), answers, {"long_name": "token id of the answer", **given})
        dataset["role"] = (("prompt", "position"), role, {"long_name": "what a token is to the fact", **given})
        dataset.attrs = {
            "noise_scale": float(self.rows.scale),
            "noise_seeds": self.rows.seeds.tolist(),
            "left_out": self.left_out,
        }
        return dataset

    # --- running -----------------------------------------------------------------------------------------------------

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Trace one block of facts."""
        chosen = unit.regions["baseline"]["prompt"]
        rows = Rows(self.facts[chosen], self.rows.seeds[chosen], self.rows.scale)
        runs = CorruptedRuns(self.model.runtime, rows, self.metrics, self.recipe.components, self.budget)
        values: dict[str, dict[str, np.ndarray]] = {"baseline": {}}
        for number, metric in enumerate(self.metrics):
            values["baseline"][f"{metric.name}_clean"] = runs.clean[number]
            values["baseline"][f"{metric.name}_corrupted"] = runs.corrupted[number].mean(axis=1)
            values["baseline"][f"{metric.name}_corrupted_sd"] = _deviation(runs.corrupted[number])
        for what in self.restored:
            traced = runs.restore(what, progress)
            for metric, found in zip(self.metrics, traced.values, strict=True):
                warn_nonfinite(metric.name, found, ~np.isnan(traced.change), partial(_cell, rows, what))
            shape = (len(rows.facts), *self._shape(what)[1:])
            effects = self._unit_effects(traced, runs)
            values[f"effects/{what.component}"] = {name: _fitted(value, shape) for name, value in effects.items()}
            fired = _fitted(traced.fired.sum(axis=1), shape)
            values[f"receipts/{what.component}"] = {
                "change_norm": _fitted(traced.change.mean(axis=1), shape),
                "fired": np.where(np.isnan(fired), -1, fired).astype(np.int32),
            }
        return values

    def _unit_effects(self, traced: Traced, runs: CorruptedRuns) -> dict[str, np.ndarray]:
        """Means over draws, axes (fact, layer, position)."""
        found: dict[str, np.ndarray] = {}
        for number, (metric, stem) in enumerate(zip(self.metrics, _stems(self.metrics), strict=True)):
            restored = traced.values[number].astype(np.float64)
            corrupted = runs.corrupted[number].astype(np.float64)
            each = restored - corrupted[:, :, None, None]
            total = runs.clean[number].astype(np.float64) - corrupted.mean(axis=1)
            total = np.where(np.abs(total) < _TINY, np.nan, total)
            mean = each.mean(axis=1)
            found[metric.name] = restored.mean(axis=1)
            found[f"indirect_effect{stem}"] = mean
            found[f"indirect_effect_sd{stem}"] = _deviation(each)
            found[f"effect{stem}"] = mean / total[:, None, None] + 0.0  # no negative zeros
        return found


def _stems(metrics: Sequence[Any]) -> list[str]:
    """The first metric's effects have the plain names, further ones the metric's name behind."""
    return ["" if number == 0 else f"_{metric.name}" for number, metric in enumerate(metrics)]


def _deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation over draws, axis 1; NaN for one draw."""
    if values.shape[1] < 2:
        return np.full(np.delete(values.shape, 1), np.nan)
    return np.asarray(values.std(axis=1, ddof=1))


def _fitted(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A block whose facts are shorter than the longest of all, with NaN beyond."""
    full = np.full(shape, np.nan, dtype=np.float32)
    full[tuple(slice(0, size) for size in values.shape)] = values
    return full


def _cell(rows: Rows, what: Restored, at: tuple[int, ...]) -> str:
    """A counterfactual for people."""
    fact, draw, layer, place = at
    prompt = rows.facts[fact].prompt
    position = prompt.positions(what.positions)[place]
    return f"{what.component} of layer {what.layers[layer]} at position {position}, draw {draw}, in {prompt.title()}"


def _title(what: Restored) -> str:
    return f"{what.component}[{what.window} layers]" if what.window > 1 else what.component


def noise_seed(seed: int, fact: EncodedFact, draw: int) -> int:
    """The seed of one fact's noise: it depends on the recipe's seed, the fact's tokens and the draw alone."""
    name = f"{seed}:{draw}:{','.join(map(str, fact.prompt.token_ids))}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def prepare(model: Model, recipe: CausalTracingRecipe) -> TracingJob:
    """Check a recipe against a model and describe the run; the facts are tried, nothing is restored."""
    return TracingJob(model, recipe)


def causal_tracing(
    model: Model,
    facts: str | Sequence[Mapping[str, str]] = "facts",
    *,
    limit: int | None = None,
    known_only: bool = True,
    noise: float = 3.0,
    draws: int = 5,
    components: Sequence[str] = ("resid_post", "attn_out", "mlp_out"),
    window: int = 10,
    layers: Any = "all",
    positions: Any = "all",
    metric: Any = ("prob", "logprob"),
    seed: int = 0,
    memory: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> xr.DataTree:
    """Causal tracing from Python: the recipe's keys as arguments, the recipe's results.

    Args:
        model: a loaded model.
        facts: ``facts`` (the set that ships with nsp), the path of a file, or mappings with prompt, subject, answer.
        noise: its standard deviation in units of the token embedding's; ``draws`` of it for each fact.
        limit, known_only, components, window, layers, positions, metric, seed: as in the recipe.
        memory: budget, such as ``4GB``.
        out: where to keep the run as a store; None keeps it in memory alone.

    Returns a tree with ``effects/<component>``, ``receipts/<component>``, ``baseline`` and ``inputs``.
    """
    recipe = checked(
        CausalTracingRecipe,
        {
            "kind": KIND,
            "facts": facts if isinstance(facts, str) else as_list(facts),
            "limit": limit,
            "known_only": known_only,
            "noise": {"scale": noise, "draws": draws},
            "components": as_list(components),
            "window": window,
            "layers": layers,
            "positions": positions,
            "metric": metric if isinstance(metric, str) else as_list(metric),
            "seed": seed,
            "memory": memory,
        },
    )
    return runner.results(prepare(model, recipe), out=out, force=force, progress=progress)


register(Experiment(KIND, CausalTracingRecipe, prepare, summarise, panels=panels))
