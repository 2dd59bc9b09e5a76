"""Base runs with their donors, as the pairs of a recipe make them, and what a store keeps of them whatever is patched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr

from nsp.datasets.pairs import Pair
from nsp.datasets.prompts import Prompt
from nsp.datasets.tokens import continuation_ids
from nsp.errors import InputError
from nsp.experiments.labels import Group, Variable, given_variable, index_coord, text_array, token_table
from nsp.metrics import METRICS, Metric
from nsp.model import Model
from nsp.results import effect_attrs
from nsp.trace import token_ids


@dataclass(frozen=True)
class PairedRun:
    """One base run with its donor, in the order of the ``pair`` dim."""

    name: str
    base: Prompt
    donor: Prompt
    base_name: str  # "clean" or "corrupt"
    tokens: tuple[int, ...]  # answer, distractor
    continuation: tuple[int, ...]  # the answer, where nothing needs it to be one token


def paired_runs(
    model: Model, pairs: Sequence[Pair], mode: str, metrics: Sequence[Metric], *, continues: bool = False
) -> list[PairedRun]:
    """The base runs of all pairs, one per pair, or two (in both directions) for an interchange.

    ``continues``: answers are only measured as continuations, so that they may be any number of tokens.
    """
    needed = max((METRICS[metric.kind].tokens for metric in metrics if not metric.tokens), default=0)
    runs = []
    for number, pair in enumerate(pairs):
        name = pair.name or f"pair {number}"
        continuation: tuple[int, ...] = ()
        if continues and pair.answer is not None:
            continuation = continuation_ids(model.tokenizer, [pair.answer])
            pair = replace(pair, answer=None, distractor=None)
        encoded = pair.encode(model.tokenizer)
        tokens = tuple(token for token in (encoded.answer, encoded.distractor) if token is not None)
        if len(tokens) < needed and not continuation:
            also = " and a distractor" if needed > 1 else ""
            raise InputError(f"{pair.label()}: the metric needs an answer{also}; name them, or take a metric such as kl")
        continuation = continuation or tokens[:1]
        clean = PairedRun(name, encoded.clean, encoded.corrupt, "clean", tokens, continuation)
        corrupt = PairedRun(name, encoded.corrupt, encoded.clean, "corrupt", tokens, continuation)
        runs += {"denoising": [corrupt], "noising": [clean], "interchange": [corrupt, clean]}[mode]
    return runs


def metric_tokens(model: Model, metric: Metric, runs: Sequence[PairedRun]) -> torch.Tensor | None:
    """Token ids that a metric reads, axes (run, token), -1 after the end of a shorter continuation; None without any."""
    kind = METRICS[metric.kind]
    if kind.tokens == 0:
        return None
    if metric.tokens:
        return torch.tensor([token_ids(model.tokenizer, metric)] * len(runs))
    if not kind.several:
        return torch.tensor([run.tokens[: kind.tokens] for run in runs])
    longest = max(len(run.continuation) for run in runs)
    return torch.tensor([[*run.continuation, *[-1] * (longest - len(run.continuation))] for run in runs])


def pair_coord(runs: Sequence[PairedRun]) -> xr.Variable:
    """The coordinate of the ``pair`` dim."""
    return index_coord("pair", len(runs), "pair of prompts, from 0")


def effect_name(number: int, metric: Metric) -> str:
    """The variable of a metric's normalised form; ``number`` is the metric's place in the recipe."""
    return "effect" if number == 0 else f"effect_{metric.name}"


def metric_variables(metrics: Sequence[Metric], dims: tuple[str, ...], method: str) -> dict[str, Variable]:
    """Each metric and its normalised form, of counterfactuals labelled by ``dims``."""
    variables = {}
    for number, metric in enumerate(metrics):
        kind = METRICS[metric.kind]
        variables[metric.name] = Variable(dims, kind.long_name, kind.units, method)
        variables[effect_name(number, metric)] = Variable(dims, **effect_attrs(metric, method))
    return variables


def baseline_group(metrics: Sequence[Metric], runs: Sequence[PairedRun]) -> Group:
    """The group ``baseline``: each metric on the clean and on the corrupt run, dims (pair,)."""
    variables = {
        f"{metric.name}_{run}": Variable(("pair",), f"{kind.long_name}, {run} run", kind.units, "ordinary forward pass")
        for metric in metrics
        for run in ("clean", "corrupt")
        for kind in [METRICS[metric.kind]]
    }
    return Group(variables, {"pair": pair_coord(runs)})


def baseline_values(
    metrics: Sequence[Metric], runs: Sequence[PairedRun], base: Iterable[np.ndarray], donor: Iterable[np.ndarray]
) -> dict[str, np.ndarray]:
    """The values of `baseline_group`, from each metric on the base runs and on the donor runs, (run,)."""
    clean_is_base = np.array([run.base_name == "clean" for run in runs])
    values = {}
    for metric, of_base, of_donor in zip(metrics, base, donor, strict=True):
        values[f"{metric.name}_clean"] = np.where(clean_is_base, of_base, of_donor)
        values[f"{metric.name}_corrupt"] = np.where(clean_is_base, of_donor, of_base)
    return values


def inputs_dataset(runs: Sequence[PairedRun], left_out: Sequence[tuple[str, str]]) -> xr.Dataset:
    """The group ``inputs``: prompts as texts and tokens with dims (pair, position), answers, names, what was left out."""
    width = max(len(prompt) for run in runs for prompt in (run.base, run.donor))
    variables: dict[str, xr.Variable] = {}
    for name in ("clean", "corrupt"):
        prompts = [run.base if run.base_name == name else run.donor for run in runs]
        ids, texts = token_table(prompts, width)
        whole = text_array([prompt.text or "".join(prompt.token_texts) for prompt in prompts])
        lengths = np.array([len(prompt) for prompt in prompts])
        variables[f"text_{name}"] = given_variable(("pair",), whole, f"{name} prompt")
        variables[f"token_id_{name}"] = given_variable(
            ("pair", "position"), ids, f"token ids of the {name} prompt (-1: none)"
        )
        variables[f"token_text_{name}"] = given_variable(("pair", "position"), texts, f"tokens of the {name} prompt")
        variables[f"n_tokens_{name}"] = given_variable(("pair",), lengths, f"length of the {name} prompt in tokens")
    for number, name in enumerate(("answer", "distractor")):
        ids = np.array([run.tokens[number] if len(run.tokens) > number else -1 for run in runs], dtype=np.int64)
        variables[f"{name}_id"] = given_variable(("pair",), ids, f"token id of the {name} (-1: none)")
    variables["pair_name"] = given_variable(("pair",), text_array([run.name for run in runs]), "name of the pair")
    bases = text_array([run.base_name for run in runs])
    variables["base"] = given_variable(("pair",), bases, "which prompt is the base run (the other one is the donor)")
    coords = {"pair": pair_coord(runs), "position": index_coord("position", width, "position")}
    attrs: dict[str, object] = {}
    if left_out:
        attrs = {"left_out": len(left_out), "left_out_items": [f"{text!r}: {reason}" for text, reason in left_out]}
    return xr.Dataset(variables, coords, attrs)
