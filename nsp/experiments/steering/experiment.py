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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.datasets.tokens import single_token, token_texts
from nsp.engine.branches import Branches
from nsp.engine.estimates import Estimate
from nsp.engine.kernels import divergence
from nsp.engine.steering_multipliers import (
    check_strengths,
    estimate_strengths,
    next_logits,
    strength_branches,
    write_counts,
)
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.arguments import recipe_value
from nsp.experiments.circuits import Circuit, CircuitUnit
from nsp.experiments.contrast.experiment import Contrast
from nsp.experiments.contrast.recipe import ContrastRecipe
from nsp.experiments.contrast.vectors import ControlVectors, control_vectors
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.feature_store import Feature, FeatureStore
from nsp.experiments.fluency import distinct, perplexities, repetition
from nsp.experiments.labels import Group, Variable, index_coord, prompts_dataset, text_array, text_coord
from nsp.experiments.prompt_options import encode_prompts
from nsp.experiments.steering.recipe import SteeringRecipe, VectorOptions, neuron_place
from nsp.experiments.steering.target import SteeringTarget
from nsp.model import Model
from nsp.sites import Selection
from nsp.stores import open_run

_BLOCK = 8  # prompts of one unit of work
_PLACES = {"both": "in the prompt and in generated tokens", "prompt": "in the prompt", "generated": "in generated tokens"}


class Steering(Experiment[SteeringRecipe]):
    """Prompts under a control vector or a scaled circuit, at several multipliers."""

    results = (
        "``effects/next_token``: ``kl``, dims (prompt, direction), ``top_id``, ``top_text`` and ``top_prob``, dims (prompt, "
        "direction, token); ``effects/tokens``: ``prob`` and ``logprob`` of the tokens named, dims (prompt, direction, "
        "token); ``generations``: ``text``, ``n_tokens``, ``perplexity``, ``repetition`` and ``distinct_2``, dims (prompt, "
        "direction), ``token_id``, dims (prompt, direction, step); ``receipts/steering``: ``fired``, dims (prompt, "
        "direction); ``activations/<component>`` or ``circuit/<component>``: what was added or scaled. The coordinate "
        "``multiplier`` says how strong each direction is."
    )

    def prepare(self) -> None:
        model, recipe = self.model, self.recipe
        self.prompts = encode_prompts(model, recipe.prompts, recipe.chat)
        self.target = target_of(model, recipe)
        given = recipe.multipliers if recipe.multipliers is not None else self.target.multipliers
        self.multipliers = tuple(sorted({*given, self.target.neutral}))
        self.tokens = list(dict.fromkeys(single_token(model.tokenizer, token, what="token") for token in recipe.tokens))
        self.decoding = None if recipe.decoding is None else recipe.decoding.to_decoding()
        self.interventions = self.target.interventions(recipe.positions)
        self.steps = 0 if self.decoding is None else self.decoding.max_new_tokens
        check_strengths(model.runtime, self.prompts, self.interventions, steps=self.steps)
        size = model.geometry.vocab_size
        if recipe.top_k > size or max(self.tokens, default=0) >= size:
            raise InputError(f"{model.name} has {size} tokens, so top_k is at most {size} and token ids end at {size - 1}")

    def statement(self) -> dict[str, Any]:
        return {
            "prompts": [list(prompt.token_ids) for prompt in self.prompts],
            "target": self.target.to_dict(),
            "multipliers": list(self.multipliers),
            "positions": self.recipe.positions,
            "when": self.recipe.acts_on,
            "tokens": self.tokens,
            "top_k": self.recipe.top_k,
            "decoding": None if self.decoding is None else asdict(self.decoding),
        }

    def estimates(self) -> Iterable[Estimate]:
        title = self.target.describe()
        yield estimate_strengths(self.model.runtime, self.prompts, len(self.multipliers), self.steps, title)

    def seeds(self) -> Mapping[str, int]:
        return {"decoding": 0 if self.decoding is None else self.decoding.seed}

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        return {"inputs": prompts_dataset(self.prompts), **self.target.groups(), **self._result_groups()}

    def _result_groups(self) -> dict[str, Group]:
        """The groups that are computed; a direction is one multiplier."""
        steered = f"{self.target.describe()}, {_PLACES[self.recipe.acts_on]}; branch path"
        written = "of the generated tokens"
        each = ("prompt", "direction")
        coords = {
            "prompt": index_coord("prompt", len(self.prompts), "prompt, from 0"),
            "direction": index_coord("direction", len(self.multipliers), "steered run, one a multiplier"),
            "multiplier": xr.Variable(("direction",), np.array(self.multipliers), {"long_name": "multiplier of the steering"}),
        }
        ranks = index_coord("token", self.recipe.top_k, "rank among next tokens, from 0")
        likely = (*each, "token")
        groups = {
            "effects/next_token": Group(
                {
                    "kl": Variable(each, "KL(unsteered || steered) of the next-token distribution", "nats", steered),
                    "top_id": Variable(likely, "most likely next tokens, by id", "1", steered, np.int64),
                    "top_text": Variable(likely, "most likely next tokens", "1", steered, object),
                    "top_prob": Variable(likely, "their probabilities", "1", steered),
                },
                coords | {"token": ranks},
            ),
            "receipts/steering": Group(
                {
                    "fired": Variable(
                        each,
                        "writes selected on the prompt (0: this multiplier changes nothing; -1: not computed)",
                        "1",
                        steered,
                        np.int32,
                    )
                },
                coords,
            ),
        }
        if self.tokens:
            groups["effects/tokens"] = Group(
                {
                    "prob": Variable(likely, "probability as the next token", "1", steered),
                    "logprob": Variable(likely, "log-probability as the next token", "nats", steered),
                },
                coords
                | {
                    "token": index_coord("token", self.tokens, "token id"),
                    "token_text": text_coord("token", token_texts(self.model.tokenizer, self.tokens), "token"),
                },
            )
        if self.steps:
            perplexity = "exp of the mean negative log-probability of a generated token"
            groups["generations"] = Group(
                {
                    "text": Variable(each, "generated text", "1", steered, object),
                    "token_id": Variable(
                        (*each, "step"), "generated token ids (-1: the text has ended)", "1", steered, np.int64
                    ),
                    "n_tokens": Variable(each, "generated tokens (-1: not computed)", "1", steered, np.int32),
                    "perplexity": Variable(
                        each, "perplexity of the text in the unsteered model (NaN: no token)", "1", perplexity
                    ),
                    "repetition": Variable(
                        each, "share of trigrams that stand in the text more than once (NaN: too short)", "1", written
                    ),
                    "distinct_2": Variable(each, "different bigrams over bigrams (NaN: too short)", "1", written),
                },
                coords | {"step": index_coord("step", self.steps, "generated token, from 0")},
            )
        return groups

    def stages(self) -> Sequence[Stage]:
        return (Stage(self._steer, tuple(self._result_groups()), {"prompt": _BLOCK}),)

    def _steer(self, region: Region, stored: Stored) -> Values:
        """Steer one block of prompts at every strength."""
        prompts = [self.prompts[row] for row in region.indices("prompt")]
        branches = strength_branches(self.model.runtime, prompts, self.interventions, self.multipliers)
        values = self._next_tokens(branches) | {"receipts/steering": {"fired": write_counts(branches)}}
        if self.decoding is not None:
            generated = self.engine.generate(branches, self.decoding, when=self.recipe.acts_on, progress=region.progress)
            values["generations"] = self._texts(prompts, generated.ids[:, :, 0, 0])
        return values

    def _next_tokens(self, branches: Branches) -> dict[str, dict[str, np.ndarray]]:
        """How each multiplier changes the next-token distribution; arrays (prompt, direction, ...)."""
        count = len(self.multipliers)
        neutral = self.multipliers.index(self.target.neutral)
        chunks: list[list[np.ndarray]] = []
        for _, logits in next_logits(self.model.runtime, branches, self.budget):
            log_p = torch.log_softmax(logits.double(), dim=1).reshape(-1, count, logits.shape[1])
            plain = log_p[:, neutral : neutral + 1]
            if self.recipe.acts_on == "generated":
                # The prompt is left as it is, so its next token is too.
                log_p = plain.expand_as(log_p)
            best = log_p.topk(self.recipe.top_k, dim=2)
            measured = [_kl(plain, log_p), best.indices, best.values.exp(), log_p[:, :, list(self.tokens)]]
            chunks.append([value.cpu().numpy() for value in self.model.runtime.fetch(measured)])
        kl, ids, prob, logprob = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        texts = text_array(token_texts(self.model.tokenizer, ids.reshape(-1).tolist())).reshape(ids.shape)
        values = {"effects/next_token": {"kl": kl, "top_id": ids, "top_text": texts, "top_prob": prob}}
        if self.tokens:
            values["effects/tokens"] = {"prob": np.exp(logprob), "logprob": logprob}
        return values

    def _texts(self, prompts: Sequence[Prompt], tokens: np.ndarray) -> dict[str, np.ndarray]:
        """The texts of generated token ids (prompt, direction, step), and how fluent they are."""
        shape, tokenizer = tokens.shape[:2], self.model.tokenizer
        texts = [[int(token) for token in row if token >= 0] for row in tokens.reshape(-1, tokens.shape[2])]
        owners = [prompt.token_ids for prompt in prompts for _ in self.multipliers]
        decoded = [tokenizer.decode(text) if tokenizer is not None else " ".join(map(str, text)) for text in texts]
        columns: dict[str, Any] = {
            "text": text_array(decoded),
            "n_tokens": [len(text) for text in texts],
            "perplexity": perplexities(self.model.runtime, owners, texts),
            "repetition": [repetition(text) for text in texts],
            "distinct_2": [distinct(text, 2) for text in texts],
        }
        return {"token_id": tokens} | {name: np.asarray(column).reshape(shape) for name, column in columns.items()}


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
        vectors = ControlVectors.from_dict(options.given)
    elif options.store is not None:
        vectors = control_vectors(open_run(options.store).tree, options.component)
    else:
        prompts = options.model_dump(exclude={"store", "given", "component"})
        contrast = {"components": [options.component], "decompose": False, "resamples": 1, "seed": seed, **prompts}
        recipe = ContrastRecipe.model_validate({"kind": "contrast", **contrast})
        vectors = control_vectors(runner.run_in_memory(Contrast(model, recipe)), options.component)
    if options.layers == "all":
        return vectors
    layers = Selection.of(options.layers).resolve(model.geometry.n_layers, what="layer of the control vector")
    return vectors.select(layers)


@recipe_value.register(ControlVectors)
def _given_vectors(vectors: ControlVectors) -> dict[str, Any]:
    return {"given": vectors.to_dict(), "component": vectors.component}


@recipe_value.register(Feature)
@recipe_value.register(SteeringTarget)
def _given_target(feature: Feature | SteeringTarget) -> dict[str, Any]:
    target = feature.target if isinstance(feature, Feature) else feature
    plain: dict[str, Any] = recipe_value({"circuit": target.circuit} if target.vectors is None else {"vector": target.vectors})
    return plain
