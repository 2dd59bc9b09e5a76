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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from nsp.engine.estimates import Estimate, estimate_ordinary
from nsp.engine.request import Request
from nsp.engine.selfcheck import ensure_checked
from nsp.errors import InputError
from nsp.experiments.direction.interventions import direction_addition, directional_ablation
from nsp.experiments.direction.prompts import divided_prompts
from nsp.experiments.direction.recipe import DirectionRecipe
from nsp.experiments.direction.scores import (
    CONDITIONS,
    SCORE,
    SCORE_NAME,
    SCORE_UNITS,
    first_tokens,
    run_scores,
    score_request,
    shows,
)
from nsp.experiments.direction.selection import (
    ablation_request,
    addition_request,
    candidate_layers,
    choose,
    layer_scores,
    mean_differences,
)
from nsp.experiments.direction.sites import effects_group, run_sweep, site_sweeps
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, given_variable, index_coord, prompts_dataset, text_array, text_coord
from nsp.interventions import Intervention

CANDIDATES, SELECTION, CHOSEN = "activations/resid_pre", "effects/selection", "circuit/chosen"


class Direction(Experiment[DirectionRecipe]):
    """Stages: the candidates; their trial, a layer at a time; the choice with scores and texts; each swept site and mode."""

    door = "find_direction"
    positional = ("positive", "negative")
    results = (
        "``circuit/chosen`` (the direction: ``vector`` with dims (direction, neuron), its layer and position), "
        "``activations/resid_pre`` (all candidates, (layer, position, neuron)), ``effects/selection`` (what each does, "
        "(layer, position)), ``baseline``, ``effects/ablated`` and ``effects/added`` (scores of the test prompts, (prompt)), "
        "``generations`` (texts, (prompt)) and ``effects/<component>-<mode>`` (patched sites, (pair, layer, position, head))"
    )

    def prepare(self) -> None:
        model, recipe = self.model, self.recipe
        self.divided = divided_prompts(model, recipe)
        self.openings = first_tokens(model.tokenizer, recipe.behaviour.openings)
        self.layers = candidate_layers(model, recipe.layers, recipe.select.below)
        ensure_checked(model.runtime)
        directional_ablation(model, np.ones(model.geometry.d_model))  # refuses models that it cannot act on
        if recipe.generate is not None and model.runtime.branch_refusal:
            raise InputError(f"generate: {model.runtime.branch_refusal}; set generate: null to run without texts")
        sweeps = [] if recipe.patch is None else site_sweeps(model, self.divided, recipe.patch, self.openings)
        self.sweeps = {f"effects/{sweep.name}": sweep for sweep in sweeps}
        self.test = self.divided.of("test")

    def statement(self) -> dict[str, Any]:
        recipe, divided = self.recipe, self.divided
        return {
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
                {
                    "site": str(sweep.item.site),
                    "mode": sweep.mode,
                    "layers": list(sweep.item.layers),
                    "pairs": len(sweep.request.bases),
                }
                for sweep in self.sweeps.values()
            ],
        }

    def seeds(self) -> Mapping[str, int]:
        return {} if self.recipe.generate is None else {"generate": self.recipe.generate.seed}

    def estimates(self) -> Iterator[Estimate]:
        blank = np.ones((self.divided.places, self.model.geometry.d_model), np.float32)

        def of(request: Request, title: str) -> Estimate:
            return self.engine.estimate(self.engine.plan(request), title)

        yield estimate_ordinary(self.model.runtime, self.divided.of("train"), "differences of means")
        trial = of(ablation_request(self.model, self.divided, self.openings, blank), "ablation, layer by layer")
        for layer in self.layers:
            yield trial
            added = addition_request(self.divided, self.openings, layer, blank, self.recipe.coefficient)
            yield of(added, f"addition at layer {layer}")
        ablation = directional_ablation(self.model, blank[0])
        yield of(score_request(self.test, self.openings, fixed=ablation), "test, ablated")
        addition = direction_addition(self.layers[-1], blank[0])
        yield of(score_request(self.test, self.openings, swept=addition), "test, added")
        for sweep in self.sweeps.values():
            yield of(sweep.request, sweep.name)

    # --- labels -----------------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, Group | xr.Dataset]:
        sites = {path: effects_group(self.model, sweep) for path, sweep in self.sweeps.items()}
        computed = {CANDIDATES: self._candidates(), SELECTION: self._selection(), **self._tested()}
        return {"inputs": self._inputs(), **computed, **sites}

    def _inputs(self) -> xr.Dataset:
        divided = self.divided
        names = [
            f"{name} {number}" for name in dict.fromkeys(divided.which) for number in range(divided.which.count(name))
        ]
        drawn = f"drawn with seed {self.recipe.seed}"
        inputs = prompts_dataset(divided.prompts, names=names).assign(
            set=given_variable(("prompt",), text_array(divided.which), "set that the prompt belongs to", "given"),
            part=given_variable(("prompt",), text_array(divided.part), "train, validation or test", drawn),
        )
        inputs.attrs["behaviour"] = self.recipe.behaviour.name
        inputs.attrs["openings"] = [
            {"token_id": first.token_id, "token_text": first.text, "openings": list(first.openings)}
            for first in self.openings
        ]
        return inputs

    @property
    def _places(self) -> dict[str, xr.Variable]:
        return {
            "layer": index_coord("layer", list(self.layers), "layer that receives the residual stream"),
            "position": index_coord("position", range(-self.divided.places, 0), "position, from the end of the prompt"),
            "token_text": text_coord("position", self.divided.place_texts, "token (empty: prompts differ in it)"),
        }

    @property
    def _columns(self) -> xr.Variable:
        return index_coord("neuron", self.model.geometry.d_model, "column of the residual stream")

    @property
    def _methods(self) -> dict[str, str]:
        """How the prompts of each condition are run."""
        everywhere = "at all positions"
        return {
            "baseline": "no intervention",
            "ablated": f"every write of the residual stream projected off the direction, {everywhere}; plain path",
            "added": f"{self.recipe.coefficient:g} x the difference of means added to its layer's residual stream, {everywhere}",
        }

    def _candidates(self) -> Group:
        method = "mean over the positive training prompts minus mean over the negative ones, summed in float64"
        # These and the scores of the trials are kept in float32 whatever the store's dtype: the choice is made of them.
        variables = {
            "direction": Variable(
                ("layer", "position", "neuron"), "candidate direction: difference of mean residual streams", "activation",
                method, store_dtype="float32",
            ),
            "norm": Variable(("layer", "position"), "length of the candidate direction", "activation", method),
        }  # fmt: skip
        return Group(variables, {**self._places, "neuron": self._columns})

    def _selection(self) -> Group:
        ablated, added = (
            f"mean over the validation prompts of the {which} set; {self._methods[condition]}"
            for which, condition in (("positive", "ablated"), ("negative", "added"))
        )
        others = f"mean over the validation prompts of the negative set; {self._methods['ablated']}"
        meanings = {
            "ablated": ("score with the candidate ablated", ablated),
            "drop": ("score as it is minus score with the candidate ablated", ablated),
            "kl": ("KL divergence that ablation makes, KL(as it is || ablated)", others),
            "added": ("score with the candidate added", added),
            "rise": ("score with the candidate added minus score as it is", added),
        }
        variables = {
            name: Variable(("layer", "position"), meaning, SCORE_UNITS, method, store_dtype="float32")
            for name, (meaning, method) in meanings.items()
        }
        return Group(variables, self._places, self.recipe.select.model_dump(mode="json"))

    def _tested(self) -> dict[str, Group]:
        """The chosen direction, and the test part's scores and texts."""
        methods = self._methods
        groups = {
            CHOSEN: self._chosen(),
            "baseline": self._scores("ordinary forward pass", with_kl=False),
            "effects/ablated": self._scores(methods["ablated"]),
            "effects/added": self._scores(methods["added"]),
        }
        return groups if self.recipe.generate is None else {**groups, "generations": self._generations()}

    def _chosen(self) -> Group:
        select = self.recipe.select
        method = f"best on the validation part by {select.by}, of those with KL at most {select.max_kl:g}"
        one = ("direction",)
        variables = {
            "vector": Variable(
                (*one, "neuron"), "chosen direction: difference of mean residual streams", "activation", method
            ),
            "layer_of": Variable(one, "layer whose incoming stream it is taken from", "1", method, np.int64),
            "place": Variable(one, "its position, from the end of the prompt", "1", method, np.int64),
            "passed": Variable(one, "1 where it keeps every condition, 0 where no candidate did", "1", method, np.int8),
        }
        return Group(variables, {"direction": index_coord("direction", 1, "chosen direction"), "neuron": self._columns})

    @property
    def _test_prompts(self) -> dict[str, xr.Variable]:
        rows = self.divided.rows("test")
        return {
            "prompt": index_coord("prompt", rows, "prompt, by its number in inputs"),
            "set": text_coord("prompt", [self.divided.which[row] for row in rows], "set that the prompt belongs to"),
        }

    def _scores(self, method: str, *, with_kl: bool = True) -> Group:
        variables = {SCORE: Variable(("prompt",), SCORE_NAME, SCORE_UNITS, method)}
        if with_kl:
            moved = "KL divergence from the run as it is, KL(as it is || run)"
            variables["kl"] = Variable(("prompt",), moved, SCORE_UNITS, method)
        return Group(variables, self._test_prompts)

    def _generations(self) -> Group:
        assert self.recipe.generate is not None
        drawn = "greedy" if self.recipe.generate.temperature == 0 else "sampled"
        shown = f"1 where the text shows {self.recipe.behaviour.name}, else 0"
        variables: dict[str, Variable] = {}
        for name in CONDITIONS:
            how = f"{drawn}; {self._methods[name]}, on the prompt and on every generated token"
            ids = f"generated token ids, {name} (-1: ended)"
            variables[f"token_id_{name}"] = Variable(("prompt", "step"), ids, "1", how, np.int64)
            variables[f"text_{name}"] = Variable(("prompt",), f"generated text, {name}", "1", how, str)
            variables[f"shows_{name}"] = Variable(("prompt",), shown, "1", how, np.int8)
        step = index_coord("step", self.recipe.generate.max_new_tokens, "generated token, from 0")
        return Group(variables, {**self._test_prompts, "step": step})

    # --- running ----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        return (
            Stage(self._find_candidates, (CANDIDATES,)),
            Stage(self._try_layer, (SELECTION,), split={"layer": 1}, needs=(CANDIDATES,)),
            Stage(self._choose_and_test, tuple(self._tested()), needs=(CANDIDATES, SELECTION)),
            *(Stage(partial(self._sweep, path), (path,)) for path in self.sweeps),
        )

    def _find_candidates(self, region: Region, stored: Stored) -> Values:
        candidates = mean_differences(self.engine, self.divided, self.layers)
        return {CANDIDATES: {"direction": candidates, "norm": np.linalg.norm(candidates.astype(np.float64), axis=-1)}}

    def _try_layer(self, region: Region, stored: Stored) -> Values:
        """What the candidates of one layer do on the validation part."""
        (row,) = region.indices("layer")
        candidates = stored[CANDIDATES]["direction"].values[row]
        scores = layer_scores(
            self.model, self.engine, self.divided, self.openings, self.layers[row], candidates, self.recipe.coefficient,
            region.progress,
        )  # fmt: skip
        return {SELECTION: {name: values[None] for name, values in asdict(scores).items()}}

    def _choose_and_test(self, region: Region, stored: Stored) -> Values:
        """Score the test part, and generate its replies, as they are, with the direction ablated, and with it added."""
        tried = stored[SELECTION]
        choice = choose(tried["drop"].values, tried["rise"].values, tried["kl"].values, self.recipe.select)
        layer, vector = self.layers[choice.layer], stored[CANDIDATES]["direction"].values[choice.layer, choice.place]
        ablation = directional_ablation(self.model, vector)
        addition = direction_addition(layer, vector, self.recipe.coefficient)
        requests = {
            "ablated": score_request(self.test, self.openings, fixed=ablation),
            "added": score_request(self.test, self.openings, swept=addition),
        }
        scores = {name: run_scores(self.engine, request, region.progress) for name, request in requests.items()}
        values: dict[str, dict[str, Any]] = {
            CHOSEN: {
                "vector": vector[None],
                "layer_of": [layer],
                "place": [choice.place - self.divided.places],
                "passed": [int(choice.passed)],
            },
            "baseline": {SCORE: scores["ablated"].base},
        }
        values |= {f"effects/{name}": {SCORE: score.score, "kl": score.kl} for name, score in scores.items()}
        if self.recipe.generate is not None:
            values["generations"] = {}
            runs: tuple[Sequence[Intervention], ...] = ((), ablation, addition)
            for condition, stated in zip(CONDITIONS, runs, strict=True):
                values["generations"] |= self._replies(condition, stated, region)
        return values

    def _replies(self, condition: str, stated: Sequence[Intervention], region: Region) -> dict[str, Any]:
        assert self.recipe.generate is not None
        request = Request(bases=self.test, swept=(), metrics=(), tokens=(), fixed=tuple(stated))
        decoding = self.recipe.generate.to_decoding()
        tokens = self.engine.generate(self.engine.plan(request), decoding, when="both", progress=region.progress)
        ids = tokens.ids[:, 0, 0, 0]
        decode = partial(self.model.tokenizer.decode, skip_special_tokens=True)
        texts = [decode([int(token) for token in row if token >= 0]) for row in ids]
        shown = [int(shows(text, self.recipe.behaviour)) for text in texts]
        return {f"token_id_{condition}": ids, f"text_{condition}": text_array(texts), f"shows_{condition}": shown}

    def _sweep(self, path: str, region: Region, stored: Stored) -> Values:
        return {path: run_sweep(self.engine, self.sweeps[path], region.progress)}
