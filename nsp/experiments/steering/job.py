"""Steering: what does a model write while a direction is added, or a circuit's neurons are scaled?

The model: a control vector (or a circuit) is taken for a direction of some meaning. It is added (or its units are
scaled) at several strengths, in the prompt and in every generated token, and the next-token distribution and the text
are compared with the unsteered ones. All strengths of a prompt decode together, as branches of one run.

Numbers beside the text tell steering from breaking: the text's perplexity under the unsteered model, and how much it
repeats itself. ``kl`` is KL(unsteered || steered) of the next-token distribution.

Limits: a strength that changes the text is no proof that the direction means what it is called; compare with random
directions of the same length. Turner et al. 2023; Rimsky et al. 2024; Zou et al. 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.datasets.tokens import single_token, token_texts
from nsp.engine.budget import Budget
from nsp.engine.kernels import divergence
from nsp.engine.plan import Plan, model_statement
from nsp.engine.schedule import Schedule
from nsp.engine.strengths import (
    Strengths,
    check_strengths,
    estimate_strengths,
    generate_strengths,
    next_logits,
    prepare_strengths,
)
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.circuits import Circuit, CircuitUnit
from nsp.experiments.contrast.job import ContrastJob, control_vectors
from nsp.experiments.contrast.recipe import ContrastRecipe
from nsp.experiments.contrast.vectors import ControlVectors
from nsp.experiments.feature_store import FeatureStore
from nsp.experiments.fluency import distinct, perplexities, repetition
from nsp.experiments.job import BranchProgress, Unit, UnitValues, blocks, header_of
from nsp.experiments.labels import prompts_dataset, text_array
from nsp.experiments.prompt_options import encode_prompts
from nsp.experiments.registry import Experiment, register
from nsp.experiments.selections import as_list
from nsp.experiments.steering.panels import panels
from nsp.experiments.steering.recipe import SteeringRecipe, VectorOptions, neuron_place
from nsp.experiments.steering.store import results_template
from nsp.experiments.steering.summary import summarise
from nsp.experiments.steering.target import SteeringTarget
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.sites import Selection
from nsp.stores import open_run

KIND = "steering"
_BLOCK = 8  # prompts of one unit of work


class SteeringJob:
    """A steering run, prepared: target made, prompts encoded, nothing steered yet."""

    def __init__(self, model: Model, recipe: SteeringRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.prompts = encode_prompts(model, recipe.prompts, recipe.chat)
        self.target = target_of(model, recipe)
        given = recipe.multipliers if recipe.multipliers is not None else self.target.multipliers
        self.multipliers = tuple(sorted({*given, self.target.neutral}))
        self.tokens = list(dict.fromkeys(single_token(model.tokenizer, token, what="token") for token in recipe.tokens))
        self.decoding = None if recipe.decoding is None else recipe.decoding.to_decoding()
        self.interventions = self.target.interventions(recipe.positions)
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        self.steps = 0 if self.decoding is None else self.decoding.max_new_tokens
        check_strengths(model.runtime, self.prompts, self.interventions, steps=self.steps)
        size = model.geometry.vocab_size
        if recipe.top_k > size or max(self.tokens, default=0) >= size:
            raise InputError(f"{model.name} has {size} tokens, so top_k is at most {size} and token ids end at {size - 1}")

    @cached_property
    def plan(self) -> Plan:
        """The plan: token ids, the target's numbers, strengths, decoding."""
        statement = {
            "prompts": [list(prompt.token_ids) for prompt in self.prompts],
            "target": self.target.to_dict(),
            "multipliers": list(self.multipliers),
            "positions": self.recipe.positions,
            "when": self.recipe.acts_on,
            "tokens": self.tokens,
            "top_k": self.recipe.top_k,
            "decoding": None if self.decoding is None else asdict(self.decoding),
        }
        model = model_statement(self.model.provenance)
        title = self.target.describe()
        made = estimate_strengths(self.model.runtime, self.prompts, len(self.multipliers), self.steps, title)
        return Plan(KIND, model, statement, Schedule((made,)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        seed = 0 if self.decoding is None else self.decoding.seed
        return header_of(self.plan, self.recipe, self.model.provenance.device, {"decoding": seed})

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of prompts, all strengths of each together."""
        return blocks(len(self.prompts), _BLOCK, self._results(1))

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN, -1 and empty."""
        tree = {"inputs": prompts_dataset(self.prompts), **self._target_groups(), **self._results(len(self.prompts))}
        return xr.DataTree.from_dict(tree)

    def _target_groups(self) -> dict[str, xr.Dataset]:
        groups = self.target.groups()
        for dataset in groups.values():
            dataset.attrs |= {"steering": self.target.kind, "description": self.target.describe()}
        return groups

    def _results(self, prompts: int) -> dict[str, xr.Dataset]:
        where = {"both": "in the prompt and in generated tokens", "prompt": "in the prompt", "generated": "in generated tokens"}
        return results_template(
            prompts,
            self.multipliers,
            dict(zip(self.tokens, token_texts(self.model.tokenizer, self.tokens), strict=True)),
            self.recipe.top_k,
            self.steps,
            f"{self.target.describe()}, {where[self.recipe.acts_on]}; branch path",
        )

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Steer one block of prompts at every strength."""
        prompts = self.prompts[unit.regions["effects/next_token"]["prompt"]]
        runtime = self.model.runtime
        strengths = prepare_strengths(runtime, prompts, self.interventions, self.multipliers)
        values = self._next(strengths)
        values["receipts/steering"] = {"fired": strengths.fired.astype(np.int32)}
        if self.decoding is not None:
            made = generate_strengths(
                runtime, strengths, self.decoding, self.budget, when=self.recipe.acts_on, progress=progress
            )
            values["generations"] = self._texts(strengths, made)
        return values

    def _next(self, strengths: Strengths) -> dict[str, dict[str, np.ndarray]]:
        count, top = len(self.multipliers), self.recipe.top_k
        neutral = self.multipliers.index(self.target.neutral)
        acting = self.recipe.acts_on != "generated"
        found: dict[str, list[np.ndarray]] = {"kl": [], "top_id": [], "top_prob": [], "logprob": []}
        for _, logits in next_logits(self.model.runtime, strengths, self.budget):
            log_p = torch.log_softmax(logits.double(), dim=1).reshape(-1, count, logits.shape[1])
            plain = log_p[:, neutral : neutral + 1]
            if not acting:
                # The prompt is left as it is, so its next token is too.
                log_p = plain.expand_as(log_p)
            best = log_p.topk(top, dim=2)
            parts = [_kl(plain, log_p), best.indices, best.values.exp(), log_p[:, :, list(self.tokens)]]
            for name, value in zip(found, self.model.runtime.fetch(parts), strict=True):
                found[name].append(value.cpu().numpy())
        kl, ids, prob, logprob = (np.concatenate(parts) for parts in found.values())
        texts = text_array(token_texts(self.model.tokenizer, ids.reshape(-1).tolist())).reshape(ids.shape)
        made: dict[str, dict[str, np.ndarray]] = {
            "effects/next_token": {"kl": kl.astype(np.float32), "top_id": ids, "top_text": texts, "top_prob": prob.astype(np.float32)}
        }
        if self.tokens:
            made["effects/tokens"] = {"prob": np.exp(logprob).astype(np.float32), "logprob": logprob.astype(np.float32)}
        return made

    def _texts(self, strengths: Strengths, tokens: np.ndarray) -> dict[str, np.ndarray]:
        shape, tokenizer = tokens.shape[:2], self.model.tokenizer
        texts = [[int(token) for token in row if token >= 0] for row in tokens.reshape(-1, tokens.shape[2])]
        owners = [strengths.prompts[base].token_ids for base in strengths.table.base]
        decoded = [tokenizer.decode(text) if tokenizer is not None else " ".join(map(str, text)) for text in texts]

        def shaped(values: Sequence[float], dtype: Any = np.float32) -> np.ndarray:
            return np.array(values, dtype=dtype).reshape(shape)

        return {
            "text": text_array(decoded).reshape(shape),
            "token_id": tokens,
            "n_tokens": shaped([len(text) for text in texts], np.int32),
            "perplexity": shaped(perplexities(self.model.runtime, owners, texts).tolist()),
            "repetition": shaped([repetition(text) for text in texts]),
            "distinct_2": shaped([distinct(text, 2) for text in texts]),
        }


def _kl(plain: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(plain || p) with dims (prompt, multiplier), of log-probabilities (prompt, 1 or multiplier, token)."""
    flat = log_p.reshape(-1, log_p.shape[2])
    reference = plain.expand_as(log_p).reshape(flat.shape)
    return divergence(reference.exp(), reference, flat).reshape(log_p.shape[:2])


def target_of(model: Model, recipe: SteeringRecipe) -> SteeringTarget:
    """What a recipe steers: vectors made or read, a circuit, neurons by name, or a feature."""
    if recipe.vector is not None:
        return SteeringTarget(vectors=_vectors(model, recipe.vector, recipe.seed))
    if recipe.feature is not None:
        return FeatureStore().load(recipe.feature, model).target
    if recipe.neurons:
        places = dict.fromkeys(neuron_place(name) for name in recipe.neurons)
        return SteeringTarget(circuit=Circuit(tuple(CircuitUnit(layer, None, unit, 0.0) for layer, unit in places)))
    assert recipe.circuit is not None
    options = recipe.circuit
    circuit = Circuit.load(options.path) if options.path is not None else Circuit.from_json(str(options.given))
    return SteeringTarget(circuit=circuit if options.top is None else circuit.top(options.top))


def _vectors(model: Model, options: VectorOptions, seed: int) -> ControlVectors:
    if options.given is not None:
        made = ControlVectors.from_dict(options.given)
    elif options.store is not None:
        made = control_vectors(open_run(options.store).tree, options.component)
    else:
        recipe = ContrastRecipe.model_validate(
            {
                "kind": "contrast", "components": [options.component], "decompose": False, "resamples": 1, "seed": seed,
                **options.model_dump(exclude={"store", "given", "component", "layers"}), "layers": options.layers,
            }
        )  # fmt: skip
        made = control_vectors(runner.run_in_memory(ContrastJob(model, recipe)), options.component)
    if options.layers == "all":
        return made
    chosen = Selection.of(options.layers)
    return made.select(chosen.resolve(model.geometry.n_layers, what="layer of the control vector"))


def prepare(model: Model, recipe: SteeringRecipe) -> SteeringJob:
    """Check a recipe against a model and describe the run."""
    return SteeringJob(model, recipe)


def steering(
    model: Model,
    prompts: str | Sequence[Any],
    *,
    vectors: ControlVectors | None = None,
    circuit: Circuit | None = None,
    target: SteeringTarget | None = None,
    multipliers: Sequence[float] | None = None,
    memory: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> xr.DataTree:
    """Steer from Python.

    Args:
        prompts: texts (or chats, or token ids) to continue.
        vectors, circuit, target: what is steered, one of them (or by options: vector, neurons, feature).
        options: the recipe's other keys: chat, positions, when, tokens, top_k, decoding, seed.
        out: where to keep the run as a store; None keeps it in memory alone.

    Returns a tree with ``generations`` (text, token_id, perplexity, repetition over prompt and direction, whose
    coordinate ``multiplier`` says how strong), ``effects/next_token`` and ``effects/tokens``.
    """
    if target is not None:
        vectors, circuit = target.vectors, target.circuit
    what: dict[str, Any] = {}
    if vectors is not None:
        what["vector"] = {"given": vectors.to_dict(), "component": vectors.component}
    if circuit is not None:
        what["circuit"] = {"given": circuit.to_json()}
    recipe = checked(
        SteeringRecipe,
        {
            "kind": KIND,
            "prompts": as_list(prompts),
            "multipliers": None if multipliers is None else as_list(multipliers),
            "memory": memory,
            **what,
            **options,
        },
    )
    return runner.results(prepare(model, recipe), out=out, force=force, progress=progress)


register(Experiment(KIND, SteeringRecipe, prepare, summarise, panels=panels))
