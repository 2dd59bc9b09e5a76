"""What an activation-patching run is made of: its base runs with their donors, its swept sites, and their token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr

from nsp.datasets.pairs import Pair
from nsp.datasets.prompts import Prompt
from nsp.datasets.tokens import continuation_ids
from nsp.errors import InputError
from nsp.experiments.activation_patching.recipe import ActivationPatchingRecipe
from nsp.metrics import METRICS, Metric
from nsp.model import Model
from nsp.sites import Site
from nsp.trace import default_axes, token_ids


@dataclass(frozen=True)
class Item:
    """One base run with its donor, in the order of the ``pair`` dim."""

    name: str
    base: Prompt
    donor: Prompt
    base_name: str  # "clean" or "corrupt"
    tokens: tuple[int, ...]  # answer, distractor
    continuation: tuple[int, ...]  # the answer, where nothing needs it to be one token


@dataclass(frozen=True)
class Sweep:
    """One swept selector: its group in the store, its site, and which axes are separate."""

    group: str
    site: Site
    axes: tuple[str, ...]


def make_items(model: Model, recipe: ActivationPatchingRecipe, pairs: Sequence[Pair]) -> list[Item]:
    """The base runs of all pairs, one a pair, or two (in both directions) for an interchange."""
    items = []
    for number, pair in enumerate(pairs):
        items += _pair_items(model, recipe, pair, pair.name or f"pair {number}")
    return items


def _pair_items(model: Model, recipe: ActivationPatchingRecipe, pair: Pair, name: str) -> list[Item]:
    own = [METRICS[metric.kind] for metric in recipe.metrics() if not metric.tokens]
    needed = max((kind.tokens for kind in own), default=0)
    continuation: tuple[int, ...] = ()
    if recipe.continues and pair.answer is not None:
        continuation = continuation_ids(model.tokenizer, [pair.answer])
        pair = replace(pair, answer=None, distractor=None)
    encoded = pair.encode(model.tokenizer)
    tokens = tuple(token for token in (encoded.answer, encoded.distractor) if token is not None)
    if len(tokens) < needed and not continuation:
        raise InputError(
            f"{pair.label()}: the metric needs an answer{' and a distractor' if needed > 1 else ''}; name them, or take a metric such as kl"
        )
    continuation = continuation or tokens[:1]
    clean = Item(name, encoded.clean, encoded.corrupt, "clean", tokens, continuation)
    corrupt = Item(name, encoded.corrupt, encoded.clean, "corrupt", tokens, continuation)
    return {"denoising": [corrupt], "noising": [clean], "interchange": [corrupt, clean]}[recipe.mode]


def make_sweeps(recipe: ActivationPatchingRecipe) -> list[Sweep]:
    """The recipe's sites, each with its axes and a group of its own."""
    sweeps: list[Sweep] = []
    for site in recipe.selected_sites():
        axes = tuple(axis for axis in default_axes(site) if axis not in recipe.together)
        same = sum(sweep.site.component == site.component for sweep in sweeps)
        sweeps.append(Sweep(site.component if not same else f"{site.component}-{same + 1}", site, axes))
    return sweeps


def metric_tokens(model: Model, metric: Metric, items: Sequence[Item]) -> torch.Tensor | None:
    """Token ids that a metric reads, axes (item, token), -1 after the end of a shorter continuation; None without any."""
    kind = METRICS[metric.kind]
    if kind.tokens == 0:
        return None
    if metric.tokens:
        return torch.tensor([token_ids(model.tokenizer, metric)] * len(items))
    if not kind.several:
        return torch.tensor([item.tokens[: kind.tokens] for item in items])
    longest = max(len(item.continuation) for item in items)
    return torch.tensor([[*item.continuation, *[-1] * (longest - len(item.continuation))] for item in items])


def pair_coord(items: Sequence[Item]) -> xr.Variable:
    """The coordinate of the ``pair`` dim."""
    return xr.Variable(("pair",), np.arange(len(items)), {"long_name": "pair of prompts, from 0"})


def inputs_dataset(items: Sequence[Item], left_out: Sequence[tuple[str, str]]) -> xr.Dataset:
    """The group ``inputs``: prompts as texts and tokens with dims (pair, position), answers, names, what was left out."""
    width = max(len(prompt) for item in items for prompt in (item.base, item.donor))
    method = {"units": "1", "method": "given, encoded by the model's tokenizer"}
    variables: dict[str, xr.Variable] = {}

    def add(name: str, dims: tuple[str, ...], values: np.ndarray, long_name: str) -> None:
        variables[name] = xr.Variable(dims, values, {"long_name": long_name, **method})

    for run in ("clean", "corrupt"):
        prompts = [item.base if item.base_name == run else item.donor for item in items]
        ids = np.full((len(prompts), width), -1, dtype=np.int64)
        texts = np.full((len(prompts), width), "", dtype=object)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt.token_ids
            texts[row, : len(prompt)] = prompt.token_texts
        whole = np.array([prompt.text or "".join(prompt.token_texts) for prompt in prompts], dtype=object)
        lengths = np.array([len(prompt) for prompt in prompts])
        add(f"text_{run}", ("pair",), whole, f"{run} prompt")
        add(f"token_id_{run}", ("pair", "position"), ids, f"token ids of the {run} prompt (-1: none)")
        add(f"token_text_{run}", ("pair", "position"), texts, f"tokens of the {run} prompt")
        add(f"n_tokens_{run}", ("pair",), lengths, f"length of the {run} prompt in tokens")
    tokens = np.full((len(items), 2), -1, dtype=np.int64)
    for row, item in enumerate(items):
        tokens[row, : len(item.tokens)] = item.tokens
    add("answer_id", ("pair",), tokens[:, 0], "token id of the answer (-1: none)")
    add("distractor_id", ("pair",), tokens[:, 1], "token id of the distractor (-1: none)")
    add("pair_name", ("pair",), np.array([item.name for item in items], dtype=object), "name of the pair")
    bases = np.array([item.base_name for item in items], dtype=object)
    add("base", ("pair",), bases, "which prompt is the base run (the other one is the donor)")
    coords = {
        "pair": pair_coord(items),
        "position": xr.Variable(("position",), np.arange(width), {"long_name": "position"}),
    }
    attrs: dict[str, object] = {}
    if left_out:
        attrs = {"left_out": len(left_out), "left_out_items": [f"{text!r}: {reason}" for text, reason in left_out]}
    return xr.Dataset(variables, coords, attrs)
