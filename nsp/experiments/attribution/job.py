"""An attribution run, prepared: scores of every prompt, exact effects, circuits and their curves, as units of work.

Each prompt is attributed (one unit of work), then verified (another two): what is finished is never computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.engine.budget import Budget
from nsp.engine.donors import Donor
from nsp.engine.edges import check_edges
from nsp.engine.gradients import Objective
from nsp.engine.masked import MaskedRuns
from nsp.engine.plan import Plan, model_statement
from nsp.engine.propagation_rules import Rules, check_rules
from nsp.engine.schedule import Estimate, Schedule, estimate
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.sweep import PromptDonors, Request, run_request
from nsp.errors import InputError
from nsp.experiments.attribution.items import attributed_items, donor_prompt, metric_kind
from nsp.experiments.attribution.panels import panels
from nsp.experiments.attribution.parts import Attributed
from nsp.experiments.attribution.recipe import OWN, AttributionRecipe
from nsp.experiments.attribution.scores import Scored, edge_scores, node_scores
from nsp.experiments.attribution.selection import Mask, Scores, ranking, select_mask
from nsp.experiments.attribution.store import Template
from nsp.experiments.attribution.summary import summarise
from nsp.experiments.attribution.verification import curve_masks, random_like, sizes_of
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.prompt_options import encode_prompts
from nsp.experiments.registry import Experiment, register
from nsp.metrics import Metric
from nsp.model import Model

KIND = "attribution"


class AttributionJob:
    """Everything about one run (see `nsp.experiments.job.Job`)."""

    def __init__(self, model: Model, recipe: AttributionRecipe) -> None:
        self.model, self.recipe = model, recipe
        runtime = model.runtime
        ensure_checked(runtime)
        if "relp" in recipe.methods:
            check_rules(runtime)
        if "edge" in recipe.methods:
            check_edges(runtime)
        made = attributed_items(model, recipe)
        self.items, self.left_out, self.every = made.items, made.left_out, made.every
        self.kind = metric_kind(recipe, self.items)
        self.budget = Budget.of(recipe.memory_bytes, runtime.device)
        self.parts = [Attributed(model, recipe, name, self.items) for name in recipe.components]
        self.rules = Rules(recipe.attention)
        self.verified = next((part for part in self.parts if part.has_units), None) if recipe.verify else None
        if recipe.verify is not None and self.verified is None:
            raise InputError("verify needs a component with heads or neurons, such as mlp_neurons or z")
        self.donor = self._donor(recipe.donor)
        self.ablations = {kind: self._donor(kind) for kind in (recipe.verify.ablations if recipe.verify else ())}
        self._known: dict[tuple[int, str, str], np.ndarray] = {}

    def _donor(self, kind: Any) -> Donor:
        if kind == "counterfactual":
            return Donor(kind, prompts=tuple(donor_prompt(item) for item in self.items))
        if kind == "zero":
            return Donor(kind)
        return Donor(kind, self.reference, self.recipe.seed, over=self.recipe.over)

    @cached_property
    def reference(self) -> tuple[Prompt, ...] | None:
        """The reference prompts of mean and resample, or None for nsp's own."""
        given = self.recipe.reference
        if given == OWN:
            return self.every
        return None if given is None else encode_prompts(self.model, given, self.recipe.chat)

    # --- description ------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Plan:
        """The plan: token ids, targets, resolved sites, methods, donors, selection, verification."""
        recipe = self.recipe
        prompts = [
            {
                "ids": list(item.prompt.token_ids), "tokens": list(item.tokens), "position": item.position,
                "donor": None if item.donor is None else list(item.donor.token_ids),
            }
            for item in self.items
        ]  # fmt: skip
        reference = None if self.reference is None else [list(prompt.token_ids) for prompt in self.reference]
        sites = [
            {
                "component": part.name,
                "layers": list(part.resolved.layers),
                "positions": [list(p) for p in part.resolved.positions],
            }
            for part in self.parts
        ]
        statement = {
            "prompts": prompts, "metric": self.kind, "sites": sites, "methods": list(recipe.methods), "steps": recipe.steps,
            "attention": recipe.attention, "donor": recipe.donor, "reference": reference, "over": recipe.over, "seed": recipe.seed,
            "select": {**recipe.select.model_dump(mode="json"), "blacklist": sorted(recipe.select.barred())},
            "verify": None if recipe.verify is None else recipe.verify.model_dump(mode="json"),
        }  # fmt: skip
        return Plan(KIND, model_statement(self.model.provenance), statement, Schedule(tuple(self._estimates())))

    def _estimates(self) -> list[Estimate]:
        verify = self.recipe.verify
        if verify is None or verify.exact != "all" or self.verified is None:
            return []
        return [
            estimate(
                self.model.runtime, self._request(self.verified, row), self.budget, f"{self.verified.each}, {item.name}"
            )
            for row, item in enumerate(self.items)
        ]

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """For each prompt its scores; then for each its exact effects; then for each its circuits."""
        stages: list[list[str]] = [["baseline", *self._score_groups()]]
        if self.verified is not None and self._verify.exact != "none":
            stages.append([f"effects/{self.verified.name}"])
        if self.recipe.nodes and any(part.has_units for part in self.parts):
            stages.append(self._circuit_groups())
        made: list[Unit] = []
        for groups in stages:
            for row in range(len(self.items)):
                made.append(Unit(len(made), {group: {"prompt": slice(row, row + 1)} for group in groups}))
        return tuple(made)

    @property
    def _verify(self) -> Any:
        assert self.recipe.verify is not None
        return self.recipe.verify

    def _score_groups(self) -> list[str]:
        edges = ["attribution/edges"] if "edge" in self.recipe.methods else []
        return [f"attribution/{part.name}" for part in self.parts if self.recipe.nodes] + edges

    def _circuit_groups(self) -> list[str]:
        groups = [f"circuit/{part.name}" for part in self.parts if part.has_units]
        if self.verified is not None:
            groups += [f"circuit/curves-{kind}" for kind in self.ablations]
            groups += ["circuit/knockout"] if self._verify.draws else []
        return groups

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results blank."""
        return Template(self.model, self.recipe, self.items, self.left_out, self.kind, self.parts, self.verified).tree()

    # --- running ----------------------------------------------------------------------------------------------------

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """One prompt's scores, exact effects, or circuits."""
        row = next(iter(unit.regions.values()))["prompt"].start
        if "baseline" in unit.regions:
            return self._run_scores(row)
        if any(group.startswith("effects/") for group in unit.regions):
            assert self.verified is not None
            return {f"effects/{self.verified.name}": self._run_effects(self.verified, row, progress)}
        return self._run_circuits(row)

    def _scored(self, row: int) -> Scored:
        item = self.items[row]
        objective = Objective(self.kind, torch.tensor([item.tokens]), (item.position,))
        return Scored(item.prompt, objective, self.donor.rows([row]), self.recipe.steps, self.rules)

    def scores(self, row: int, part: Attributed, method: str) -> np.ndarray:
        """Scores of one prompt, (layer, position, unit); computed once."""
        key = (row, part.name, method)
        if key not in self._known:
            self._known[key] = node_scores(self.model.runtime, self._scored(row), part.site, method)
        return self._known[key]

    def _run_scores(self, row: int) -> UnitValues:
        values: dict[str, dict[str, np.ndarray]] = {
            "baseline": {self.kind: np.array([self._runs(row).base], dtype=np.float32)}
        }
        for part in self.parts if self.recipe.nodes else ():
            values[f"attribution/{part.name}"] = {
                method: part.fitted(self.scores(row, part, method), np.nan, np.float32) for method in self.recipe.nodes
            }
        if "edge" in self.recipe.methods:
            values["attribution/edges"] = {"edge": edge_scores(self.model.runtime, self._scored(row))[None]}
        return values

    def _metric(self, row: int) -> Metric:
        return Metric(self.kind, position=str(self.items[row].position))

    def _runs(self, row: int) -> MaskedRuns:
        item = self.items[row]
        return MaskedRuns(self.model.runtime, item.prompt, self._metric(row), torch.tensor([item.tokens]), self.budget)

    def _request(self, part: Attributed, row: int) -> Request:
        intervention, prompts = self.donor.rows([row]).intervention(
            self.model.runtime, part.each, [self.items[row].prompt]
        )
        item = self.items[row]
        donors: tuple[PromptDonors | None, ...] = (prompts,)
        return Request(
            (item.prompt,),
            (intervention,),
            (self._metric(row),),
            (torch.tensor([item.tokens]),),
            axes=part.axes,
            donors=donors,
        )

    def _run_effects(self, part: Attributed, row: int, progress: BranchProgress | None) -> dict[str, np.ndarray]:
        if self._verify.exact == "all":
            outcome = run_request(self.model.runtime, self._request(part, row), self.budget, progress)
            found, base = outcome.values[0][0], float(outcome.base[0][0])
        else:
            found, base = self._top_effects(part, row)
        return {
            self.kind: part.fitted(found, np.nan, np.float32),
            "change": part.fitted(found.astype(np.float64) - base, np.nan, np.float32),
        }

    def _top_effects(self, part: Attributed, row: int) -> tuple[np.ndarray, float]:
        """The metric with each of every method's strongest units replaced, NaN elsewhere, (layer, position, unit)."""
        scores = {method: self.scores(row, part, method) for method in self.recipe.nodes}
        chosen = sorted({int(at) for one in scores.values() for at in ranking(np.abs(one))[: self._verify.top]})
        shape = next(iter(scores.values())).shape
        kept = np.ones((len(chosen), int(np.prod(shape))), dtype=bool)
        kept[np.arange(len(chosen)), chosen] = False
        runs = self._runs(row)
        found = np.full(kept.shape[1], np.nan, dtype=np.float32)
        found[chosen] = runs.run(part.site, self.donor.rows([row]), kept.reshape(len(chosen), *shape))
        return found.reshape(shape), runs.base

    # --- circuits ---------------------------------------------------------------------------------------------------

    def _masks(self, part: Attributed, row: int) -> dict[str, Mask]:
        """The selected units of one prompt by each method, (layer, position, unit) of the longest prompt."""
        recipe = self.recipe
        rows = (
            [row]
            if recipe.select.over == "prompt" and recipe.select.universal is None
            else list(range(len(self.items)))
        )
        places = np.full((len(rows), part.shape[1]), -1, dtype=np.int64)
        for number, one in enumerate(rows):
            positions = part.resolved.positions[one]
            places[number, : len(positions)] = positions
        lengths = [len(self.items[one].prompt) for one in rows]
        metric = np.array([self._base(one) for one in rows])
        found = {}
        for method in recipe.nodes:
            stacked = np.full((len(rows), *part.shape), np.nan)
            for number, one in enumerate(rows):
                values = self.scores(one, part, method)
                stacked[number, : values.shape[0], : values.shape[1], : values.shape[2]] = -values
            scores = Scores(stacked, part.resolved.layers, places, lengths, metric)
            chosen = recipe.select.model_copy(update={"method": method})
            found[method] = select_mask(scores, chosen, self.model.geometry.n_layers)[rows.index(row)]
        return found

    def _base(self, row: int) -> float:
        key = (row, "", "base")
        if key not in self._known:
            self._known[key] = np.array(self._runs(row).base)
        return float(self._known[key])

    def _run_circuits(self, row: int) -> UnitValues:
        values: dict[str, dict[str, np.ndarray]] = {}
        for part in self.parts:
            if not part.has_units:
                continue
            masks = self._masks(part, row)
            values[f"circuit/{part.name}"] = {
                method: part.fitted(mask.astype(np.int8), -1, np.int8) for method, mask in masks.items()
            }
            if part is self.verified:
                values |= self._run_verification(part, row, masks[self.recipe.select.method])
        return values

    def _run_verification(self, part: Attributed, row: int, circuit: Mask) -> dict[str, dict[str, np.ndarray]]:
        verify, runs = self._verify, self._runs(row)
        orders = {method: self._order(part, row, method) for method in self.recipe.nodes}
        shape = self.scores(row, part, self.recipe.nodes[0]).shape
        sizes = sizes_of(verify.sizes, int(np.prod(shape)))
        found: dict[str, dict[str, np.ndarray]] = {}
        seed = self.recipe.seed * 1_000_003 + row
        for number, kind in enumerate(self.ablations):
            donor = self.ablations[kind].rows([row])
            values: dict[str, np.ndarray] = {}
            for method, order in orders.items():
                masks = curve_masks(order, sizes, shape)
                measured = runs.run(part.site, donor, np.concatenate(list(masks.values()))).reshape(
                    len(masks), 1, len(sizes)
                )
                values |= {f"{measure}_{method}": part for measure, part in zip(masks, measured, strict=True)}
            values["empty"] = runs.run(part.site, donor, np.zeros((1, *shape), dtype=bool))
            values["whole"] = np.array([runs.base], dtype=np.float32)
            if number == 0 and verify.curve_draws:
                inside = curve_masks(orders[self.recipe.select.method], sizes, shape)["faithfulness"]
                drawn = np.stack([random_like(one, verify.curve_draws, seed + at) for at, one in enumerate(inside)])
                measured = runs.run(part.site, donor, drawn.reshape(-1, *shape))
                values["random"] = measured.reshape(1, len(sizes), verify.curve_draws)
            found[f"circuit/curves-{kind}"] = values
        if verify.draws:
            own = circuit[: shape[0], : shape[1], : shape[2]]
            masks_out = ~np.concatenate([own[None], random_like(own, verify.draws, seed)])
            measured = runs.run(part.site, Donor("zero"), masks_out)
            found["circuit/knockout"] = {
                "circuit": measured[:1], "random": measured[None, 1:], "size": np.array([own.sum()], dtype=np.int32),
            }  # fmt: skip
        return found

    def _order(self, part: Attributed, row: int, method: str) -> np.ndarray:
        """All units, strongest first: by the prompt's own scores, or by their mean over prompts where circuits are of many."""
        own = self.scores(row, part, method)
        if self.recipe.select.over == "prompt":
            return ranking(np.abs(own))
        every = [self.scores(one, part, method) for one in range(len(self.items))]
        if any(one.shape != own.shape for one in every):
            raise InputError(
                f"over: {self.recipe.select.over} needs as many positions in every prompt; take positions: last"
            )
        return ranking(np.abs(np.mean(every, axis=0)))


def prepare(model: Model, recipe: AttributionRecipe) -> AttributionJob:
    """Check a recipe against a model and describe the run; one ordinary pass says what the model predicts."""
    return AttributionJob(model, recipe)


register(Experiment(KIND, AttributionRecipe, prepare, summarise, panels=panels))
