"""Direction: one vector of the residual stream that carries a behaviour, such as refusal or the language of a reply.

The model: prompts that bring a behaviour about, and prompts that do not. At every layer and at every token after the
instruction, the difference of the two sets' mean residual streams is a candidate
(`nsp.experiments.direction.selection`). The chosen one is taken out of everything that writes to the stream, and added
to the stream at its layer (`nsp.experiments.direction.interventions`); scores and generated texts of prompts that
neither the means nor the choice have seen say what that does (`nsp.experiments.direction.scores`).

Sign: positive minus negative. Ablation should lower the score of positive prompts, addition raise that of negative ones.

Cost: a full forward pass for each candidate and validation prompt of either set, and a partial one for each negative one.

Limits: one direction at a time, and a linear one. The behaviour is judged by first tokens and by phrases, not by reading.
A model that does not show the behaviour still has log-odds, and the report says that its effects are on those alone.
Arditi et al. 2024, "Refusal in language models is mediated by a single direction"; difference in means: Belrose 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsp.engine.budget import Budget
from nsp.engine.generation import generate_request
from nsp.engine.plan import Plan, model_statement
from nsp.engine.request import Request
from nsp.engine.schedule import Estimate, Schedule, estimate, estimate_ordinary
from nsp.engine.selfcheck import ensure_checked
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.direction.interventions import direction_addition, directional_ablation
from nsp.experiments.direction.panels import panels
from nsp.experiments.direction.prompts import divided_prompts
from nsp.experiments.direction.recipe import DirectionRecipe
from nsp.experiments.direction.scores import SCORE, Scores, first_tokens, run_scores, score_request, shows
from nsp.experiments.direction.selection import (
    Choice,
    LayerScores,
    ablation_request,
    addition_request,
    candidate_layers,
    choose,
    layer_scores,
    mean_differences,
)
from nsp.experiments.direction.sites import effects_dataset, run_sweep, site_sweeps
from nsp.experiments.direction.store import CONDITIONS, DirectionGroups
from nsp.experiments.direction.summary import summarise
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.labels import text_array
from nsp.experiments.prompt_options import prompts_key
from nsp.experiments.registry import Experiment, register
from nsp.interventions import Intervention
from nsp.model import Model
from nsp.recipe_errors import checked

KIND = "direction"
FOUND, CHOSEN = "activations/resid_pre", "circuit/chosen"
SELECTION = "effects/selection"


class DirectionJob:
    """A direction run, prepared: prompts encoded and divided, sites resolved, nothing run yet.

    Units of work, in order: the candidates; their trial, one a layer; the choice with its scores and texts; one a swept
    component and mode. Later units stand on earlier ones, which are computed again where a resumed run needs them.
    """

    def __init__(self, model: Model, recipe: DirectionRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.divided = divided_prompts(model, recipe)
        self.openings = first_tokens(model.tokenizer, recipe.behaviour.openings)
        self.layers = candidate_layers(model, recipe.layers, recipe.select.below)
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        ensure_checked(model.runtime)
        directional_ablation(model, np.ones(model.geometry.d_model))  # refuses models that it cannot act on
        if recipe.generate is not None and model.runtime.branch_refusal:
            raise InputError(f"generate: {model.runtime.branch_refusal}; set generate: null to run without texts")
        options = recipe.patch
        self.sweeps = [] if options is None else site_sweeps(model, self.divided, options, self.openings)
        self.test = [self.divided.prompts[row] for row in self.divided.rows("test")]
        self._tried: dict[int, LayerScores] = {}
        self.groups = DirectionGroups(model, recipe, self.divided, self.layers, self.openings)

    @cached_property
    def plan(self) -> Plan:
        """The plan: token ids and parts, candidates, how one is chosen, what is measured and generated."""
        recipe, divided = self.recipe, self.divided
        statement = {
            "prompts": [list(prompt.token_ids) for prompt in divided.prompts],
            "sets": list(divided.which),
            "parts": list(divided.part),
            "places": divided.places,
            "layers": list(self.layers),
            "openings": [opening.token_id for opening in self.openings],
            "behaviour": recipe.behaviour.model_dump(mode="json"),
            "select": recipe.select.model_dump(mode="json"),
            "coefficient": recipe.coefficient,
            "generate": None if recipe.generate is None else recipe.generate.model_dump(mode="json"),
            "sites": [
                {"site": str(sweep.item.site), "mode": sweep.mode, "layers": list(sweep.item.layers), "pairs": len(sweep.request.bases)}
                for sweep in self.sweeps
            ],
        }
        return Plan(KIND, model_statement(self.model.provenance), statement, Schedule(tuple(self._estimates())))

    def _estimates(self) -> list[Estimate]:
        runtime, blank = self.model.runtime, np.ones((self.divided.places, self.model.geometry.d_model), np.float32)
        train = [self.divided.prompts[row] for row in self.divided.rows("train")]

        def of(request: Request, title: str) -> Estimate:
            return estimate(runtime, request, self.budget, title)

        found = [estimate_ordinary(runtime, train, "differences of means")]
        trial = of(ablation_request(self.model, self.divided, self.openings, blank), "ablation, layer by layer")
        for layer in self.layers:
            found.append(trial)
            request = addition_request(self.divided, self.openings, layer, blank, self.recipe.coefficient)
            found.append(of(request, f"addition at layer {layer}"))
        ablated = directional_ablation(self.model, blank[0])
        found.append(of(score_request(self.test, self.openings, fixed=ablated), "test, ablated"))
        added = direction_addition(self.layers[-1], blank[0])
        found.append(of(score_request(self.test, self.openings, swept=added), "test, added"))
        return [*found, *(of(sweep.request, sweep.name) for sweep in self.sweeps)]

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        seeds = {}
        if self.recipe.generate is not None:
            seeds["generate"] = self.recipe.generate.seed
        return header_of(self.plan, self.recipe, self.model.provenance.device, seeds)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """See the class."""
        tests: list[Mapping[str, Mapping[str, slice]]] = [{FOUND: {}}]
        tests += [{SELECTION: {"layer": slice(place, place + 1)}} for place in range(len(self.layers))]
        tests.append({path: {} for path in self.groups.tested()})
        tests += [{f"effects/{sweep.name}": {}} for sweep in self.sweeps]
        return tuple(Unit(number, regions) for number, regions in enumerate(tests))

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        tree = {"inputs": self.groups.inputs(), FOUND: self.groups.candidates(), SELECTION: self.groups.selection()}
        tree |= self.groups.tested()
        return xr.DataTree.from_dict(tree | {f"effects/{sweep.name}": effects_dataset(self.model, sweep) for sweep in self.sweeps})

    # --- running ----------------------------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> np.ndarray:
        """Differences of means, axes (layer, position, neuron)."""
        return mean_differences(self.model, self.divided, self.layers, self.budget)

    def trial(self, place: int, progress: BranchProgress | None = None) -> LayerScores:
        """What the candidates of one of the layers do on the validation part."""
        if place not in self._tried:
            self._tried[place] = layer_scores(
                self.model, self.divided, self.openings, self.layers[place], self.candidates[place],
                self.recipe.coefficient, self.budget, progress,
            )  # fmt: skip
        return self._tried[place]

    @property
    def choice(self) -> Choice:
        """The chosen candidate."""
        tried = [self.trial(place) for place in range(len(self.layers))]
        drop, rise, kl = (np.stack([getattr(one, name) for one in tried]) for name in ("drop", "rise", "kl"))
        return choose(drop, rise, kl, self.recipe.select)

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Run one unit (see the class)."""
        if FOUND in unit.regions:
            norm = np.linalg.norm(self.candidates.astype(np.float64), axis=-1)
            return {FOUND: {"direction": self.candidates, "norm": norm.astype(np.float32)}}
        if SELECTION in unit.regions:
            tried = asdict(self.trial(unit.regions[SELECTION]["layer"].start, progress))
            return {SELECTION: {name: values[None].astype(np.float32) for name, values in tried.items()}}
        if CHOSEN in unit.regions:
            return self._test(progress)
        path = next(iter(unit.regions))
        sweep = next(one for one in self.sweeps if path == f"effects/{one.name}")
        return {path: run_sweep(self.model, sweep, self.budget, progress)}

    def _test(self, progress: BranchProgress | None) -> UnitValues:
        """Score the test part, and generate its replies, as they are, with the direction ablated, and with it added."""
        choice = self.choice
        layer, vector = self.layers[choice.layer], self.candidates[choice.layer, choice.place]
        added = direction_addition(layer, vector, self.recipe.coefficient)
        ablated = directional_ablation(self.model, vector)
        scores = {
            "ablated": self._scores(score_request(self.test, self.openings, fixed=ablated), progress),
            "added": self._scores(score_request(self.test, self.openings, swept=added), progress),
        }
        found: dict[str, dict[str, np.ndarray]] = {
            CHOSEN: {
                "vector": vector[None],
                "layer_of": np.array([layer]),
                "place": np.array([choice.place - self.divided.places]),
                "passed": np.array([int(choice.passed)], dtype=np.int8),
            },
            "baseline": {SCORE: scores["ablated"].base.astype(np.float32)},
        }
        for name, one in scores.items():
            found[f"effects/{name}"] = {SCORE: one.score.astype(np.float32), "kl": one.kl.astype(np.float32)}
        if self.recipe.generate is not None:
            found["generations"] = {}
            runs: tuple[Sequence[Intervention], ...] = ((), ablated, added)
            for condition, stated in zip(CONDITIONS, runs, strict=True):
                found["generations"] |= self._replies(condition, stated, progress)
        return found

    def _scores(self, request: Request, progress: BranchProgress | None) -> Scores:
        return run_scores(self.model, request, self.budget, progress)

    def _replies(
        self, condition: str, stated: Sequence[Intervention], progress: BranchProgress | None
    ) -> dict[str, np.ndarray]:
        assert self.recipe.generate is not None
        request = Request(bases=tuple(self.test), swept=(), metrics=(), tokens=(), fixed=tuple(stated))
        tokens, _ = generate_request(
            self.model.runtime, request, self.recipe.generate.to_decoding(), self.budget, when="both", progress=progress
        )
        ids = tokens[:, 0, 0, 0]
        texts = [self.model.tokenizer.decode([int(token) for token in row if token >= 0], skip_special_tokens=True) for row in ids]
        shown = np.array([int(shows(text, self.recipe.behaviour)) for text in texts], dtype=np.int8)
        return {f"token_id_{condition}": ids, f"text_{condition}": text_array(texts), f"shows_{condition}": shown}


def prepare(model: Model, recipe: DirectionRecipe) -> DirectionJob:
    """Check a recipe against a model and describe the run; nothing is written and no candidate is tried."""
    return DirectionJob(model, recipe)


def find_direction(
    model: Model,
    positive: Sequence[Any] | str | Path,
    negative: Sequence[Any] | str | Path,
    *,
    openings: Sequence[str],
    phrases: Sequence[str] = (),
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> xr.DataTree:
    """Find a behaviour's direction from Python: the recipe's keys as arguments, the recipe's results.

    Args:
        model: a loaded model.
        positive, negative: prompts that bring the behaviour about, and that do not: lists, or files of them.
        openings: how replies with the behaviour begin; ``phrases`` what generated ones hold.
        out: where to keep the run as a store; None keeps it in memory alone.
        options: further keys of the recipe, such as ``layers``, ``select`` and ``patch``; ``behaviour`` for its other keys.

    Returns a tree with ``circuit/chosen`` (the direction), ``activations/resid_pre`` (all candidates),
    ``effects/selection``, ``baseline``, ``effects/ablated``, ``effects/added`` and ``generations``.
    """
    behaviour = {"openings": openings, "phrases": phrases, **options.pop("behaviour", {})}
    sets = {"positive": prompts_key(positive), "negative": prompts_key(negative)}
    recipe = checked(DirectionRecipe, {"kind": KIND, **sets, "behaviour": behaviour, **options})
    return runner.results(prepare(model, recipe), out=out, force=force, progress=progress)


register(Experiment(KIND, DirectionRecipe, prepare, summarise, panels=panels))
