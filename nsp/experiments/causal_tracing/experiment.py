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
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.facts import EncodedFact, Fact, encode_fact, roles
from nsp.engine.estimates import Estimate
from nsp.engine.selfcheck import ensure_checked
from nsp.errors import InputError
from nsp.experiments.arguments import recipe_value
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
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, given_variable, index_coord, prompts_dataset, text_array
from nsp.experiments.nonfinite import warn_nonfinite
from nsp.metrics import METRICS, Metric
from nsp.results import position_coords
from nsp.sites import Selection

# One unit of work: what is lost at most when a run is killed.
_UNIT_FLOP = 4e12
# A scale smaller than this is none to normalise by.
_TINY = 1e-6
_CELL = ("prompt", "layer", "position")


class CausalTracing(Experiment[CausalTracingRecipe]):
    """Facts that were tried, the noise that corrupts each, and the states that are restored."""

    positional = ("facts",)
    results = (
        "``effects/<component>``: each metric under restoration, ``indirect_effect`` (restored - corrupted), "
        "``indirect_effect_sd`` (over draws) and ``effect`` (0 corrupted, 1 clean), dims (prompt, layer, position); of "
        "further metrics with their names behind; ``baseline``: ``<metric>_clean``, ``<metric>_corrupted`` and "
        "``<metric>_corrupted_sd``, dims (prompt,); ``receipts/<component>``: ``fired`` and ``change_norm``; ``inputs``: "
        "facts, tokens and ``role``, what each token is to its fact. A prompt is a fact."
    )

    def prepare(self) -> None:
        model, recipe = self.model, self.recipe
        self.metrics = recipe.metrics()
        ensure_checked(model.runtime)
        self.left_out: list[str] = []
        self.facts = self._facts()
        noise = recipe.noise
        unit = subject_deviation(self.engine, self.facts) if noise.of == "subjects" else 1.0
        seeds = [[noise_seed(recipe.seed, fact, draw) for draw in range(noise.draws)] for fact in self.facts]
        self.rows = Rows(self.facts, np.array(seeds), noise.scale * unit)
        self.selection = Selection.of(recipe.positions)
        self.positions = [fact.prompt.positions(self.selection) for fact in self.facts]
        self.restored = tuple(self._restored(component) for component in recipe.components)

    def _facts(self) -> tuple[EncodedFact, ...]:
        """The facts that are traced; those that cannot be are named in ``left_out``."""
        facts = [encode_fact(self.model.tokenizer, fact) for fact in self.recipe.read_facts()]
        for fact in facts:
            if len(fact.prompt.span("subject")) == len(fact.prompt):
                raise InputError(f"{fact.fact.label()}: the subject is the whole prompt, so nothing follows it")
        if self.recipe.known_only:
            answer_ranks = ranks(self.engine, facts)
            self.left_out = [fact.fact.prompt for fact, rank in zip(facts, answer_ranks, strict=True) if rank > 0]
            facts = [fact for fact, rank in zip(facts, answer_ranks, strict=True) if rank == 0]
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

    def _restored(self, component: str) -> Restored:
        geometry = self.model.geometry
        having = geometry.layers_of(component)
        if component != "resid_post":
            geometry.where(component)
        selection = Selection.of(self.recipe.layers)
        layers = having if selection.everything else selection.resolve(geometry.n_layers, what=f"layer of {component}")
        geometry.require(component, tuple(layers))
        return Restored(component, tuple(layers), self.recipe.width(component), self.selection)

    # --- description ------------------------------------------------------------------------------------------------

    def statement(self) -> dict[str, Any]:
        facts = [
            {"prompt": list(fact.prompt.token_ids), "subject": list(fact.prompt.span("subject")), "answer": fact.answer}
            for fact in self.facts
        ]
        restored = [
            {"component": what.component, "layers": list(what.layers), "window": what.window} for what in self.restored
        ]
        return {
            "facts": facts,
            "noise": {"scale": self.rows.scale, "seeds": self.rows.seeds.tolist()},
            "restored": restored,
            "positions": [list(positions) for positions in self.positions],
            "metrics": [metric.to_dict() for metric in self.metrics],
        }

    def estimates(self) -> Iterable[Estimate]:
        return self._estimates

    @cached_property
    def _estimates(self) -> tuple[Estimate, ...]:
        """The cost of restoring each component."""
        bases = corrupted_bases(self.engine, self.rows, self.metrics, self.recipe.components)
        together = 2 * self._block * self.rows.draws
        estimates = []
        for what in self.restored:
            branches, _ = restore_branches(bases, self.rows, what, self.model.geometry.layers_of(what.component))
            estimates.append(self.engine.estimate(branches, f"restore {_title(what)}", together=together))
        return tuple(estimates)

    @cached_property
    def _block(self) -> int:
        """Facts of one unit of work, the same for the same plan on every machine."""
        longest = max(map(len, self.rows.prompts))
        cells = self.rows.draws * longest * sum(len(what.layers) for what in self.restored)
        each = cells * longest * self.model.geometry.n_layers / 4 * self.model.runtime.cost.per_token
        return max(1, min(len(self.facts), int(_UNIT_FLOP / max(1.0, each))))

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        groups: dict[str, Group | xr.Dataset] = {"inputs": self._inputs(), "baseline": self._baseline()}
        prompts = [fact.prompt for fact in self.facts]
        for what in self.restored:
            name = "layer" if what.window == 1 else f"centre of {what.window} layers"
            coords: Any = {
                "prompt": index_coord("prompt", len(prompts), "fact, from 0"),
                "layer": index_coord("layer", what.layers, name),
                **position_coords(self.positions, prompts, "prompt"),
            }
            attrs = {"component": what.component, "window": what.window}
            groups[f"effects/{what.component}"] = Group(self._effects(what), coords, attrs)
            groups[f"receipts/{what.component}"] = self._receipts(coords)
        return groups

    def _effects(self, what: Restored) -> dict[str, Variable]:
        method = f"{_title(what)} restored from the clean run under noise on the subject, mean over {self.rows.draws} draws"
        variables: dict[str, Variable] = {}
        for metric, stem in self._stems():
            name, units = metric.name, METRICS[metric.kind].units
            spread = f"standard deviation of the indirect effect on {name} over draws of noise"
            share = f"share of the total effect on {name} that comes back: 0 corrupted, 1 clean"
            normalised = f"(restored - corrupted) / (clean - corrupted); {method}"
            variables |= {
                name: Variable(_CELL, METRICS[metric.kind].long_name, units, method),
                f"indirect_effect{stem}": Variable(
                    _CELL, f"indirect effect on {name}: restored - corrupted", units, method
                ),
                f"indirect_effect_sd{stem}": Variable(_CELL, spread, units, method),
                f"effect{stem}": Variable(_CELL, share, "1", normalised),
            }
        return variables

    def _stems(self) -> list[tuple[Metric, str]]:
        """The first metric's effects have the plain names, further ones the metric's name behind."""
        return [(metric, f"_{metric.name}" if number else "") for number, metric in enumerate(self.metrics)]

    def _receipts(self, coords: Mapping[str, xr.Variable]) -> Group:
        path, reason = self._estimates[0].path, self._estimates[0].reason
        method = f"reported by the engine, {path} path"
        change = "L2 norm of what restoring changed at its sites, mean over draws"
        fired = "writes made over all draws (0: effect exactly zero by construction; -1: not computed)"
        variables = {
            "change_norm": Variable(_CELL, change, "activation", method),
            "fired": Variable(_CELL, fired, "1", method, np.int32),
        }
        return Group(variables, coords, {"path": path, "path_reason": reason})

    def _baseline(self) -> Group:
        runs = {
            "clean": "clean run",
            "corrupted": "corrupted runs, mean over draws",
            "corrupted_sd": "corrupted runs, standard deviation over draws",
        }
        variables = {
            f"{metric.name}_{run}": Variable(("prompt",), f"{kind.long_name}, {words}", kind.units, "full forward pass")
            for metric in self.metrics
            for run, words in runs.items()
            for kind in [METRICS[metric.kind]]
        }
        return Group(variables, {"prompt": index_coord("prompt", len(self.facts), "fact, from 0")})

    def _inputs(self) -> xr.Dataset:
        facts = self.facts
        dataset = prompts_dataset([fact.prompt for fact in facts], names=[fact.fact.subject for fact in facts])
        role = np.full((len(facts), dataset.sizes["position"]), "", dtype=object)
        for row, fact in enumerate(facts):
            role[row, : len(fact.prompt)] = list(roles(fact.prompt))
        attrs = {
            "noise_scale": float(self.rows.scale),
            "noise_seeds": self.rows.seeds.tolist(),
            "left_out": self.left_out,
        }
        answers = np.array([fact.answer for fact in facts], dtype=np.int64)
        return dataset.assign(
            subject=given_variable(("prompt",), text_array([fact.fact.subject for fact in facts]), "subject"),
            answer=given_variable(("prompt",), text_array([fact.fact.answer for fact in facts]), "answer"),
            answer_id=given_variable(("prompt",), answers, "token id of the answer"),
            role=given_variable(("prompt", "position"), role, "what a token is to the fact"),
        ).assign_attrs(attrs)

    # --- running ----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        groups = tuple(path for path in self.blanks if path != "inputs")
        return (Stage(self._trace, groups, {"prompt": self._block}),)

    def _trace(self, region: Region, stored: Stored) -> Values:
        """Trace one block of facts."""
        chosen = region.blocks["prompt"]
        rows = Rows(self.facts[chosen], self.rows.seeds[chosen], self.rows.scale)
        runs = CorruptedRuns(self.engine, rows, self.metrics, self.recipe.components)
        baseline = {}
        for metric, clean, corrupted in zip(self.metrics, runs.clean, runs.corrupted, strict=True):
            baseline[f"{metric.name}_clean"] = clean
            baseline[f"{metric.name}_corrupted"] = corrupted.mean(axis=1)
            baseline[f"{metric.name}_corrupted_sd"] = _deviation(corrupted)
        values = {"baseline": baseline}
        for what in self.restored:
            traced = runs.restore(what, region.progress)
            for metric, restored in zip(self.metrics, traced.values, strict=True):
                warn_nonfinite(metric.name, restored, ~np.isnan(traced.change), partial(_cell, rows, what))
            change, fired = traced.change.mean(axis=1), traced.fired.sum(axis=1)
            values[f"effects/{what.component}"] = self._traced_effects(traced, runs)
            values[f"receipts/{what.component}"] = {"change_norm": change, "fired": fired}
        return values

    def _traced_effects(self, traced: Traced, runs: CorruptedRuns) -> dict[str, np.ndarray]:
        """Means over draws, axes (fact, layer, position)."""
        effects: dict[str, np.ndarray] = {}
        for number, (metric, stem) in enumerate(self._stems()):
            restored = traced.values[number].astype(np.float64)
            corrupted = runs.corrupted[number].astype(np.float64)
            each = restored - corrupted[:, :, None, None]
            total = runs.clean[number].astype(np.float64) - corrupted.mean(axis=1)
            total = np.where(np.abs(total) < _TINY, np.nan, total)
            mean = each.mean(axis=1)
            effects[metric.name] = restored.mean(axis=1)
            effects[f"indirect_effect{stem}"] = mean
            effects[f"indirect_effect_sd{stem}"] = _deviation(each)
            effects[f"effect{stem}"] = mean / total[:, None, None] + 0.0  # no negative zeros
        return effects


@recipe_value.register(Fact)
def _given_fact(fact: Fact) -> dict[str, str]:
    return {"prompt": fact.prompt, "subject": fact.subject, "answer": fact.answer}


def _deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation over draws, axis 1; NaN for one draw."""
    if values.shape[1] < 2:
        return np.full(np.delete(values.shape, 1), np.nan)
    return np.asarray(values.std(axis=1, ddof=1))


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
