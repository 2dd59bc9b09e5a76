"""Activation patching from Python: the recipe's keys as arguments, and one call for the recovery of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import xarray as xr

from nsp.datasets.pairs import Pair
from nsp.datasets.pairs import pair as make_pair
from nsp.datasets.prompts import PromptLike
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.activation_patching.figure import check_place, patching_figure, show
from nsp.experiments.activation_patching.job import KIND, prepare
from nsp.experiments.activation_patching.recipe import ActivationPatchingRecipe
from nsp.experiments.selections import as_list
from nsp.metrics import Metric
from nsp.model import Model
from nsp.recipe_errors import checked

PairsLike = Pair | Sequence[Pair] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | str
Mode = Literal["denoising", "noising", "interchange"]


def activation_patching(
    model: Model,
    pairs: PairsLike,
    *,
    components: str | Sequence[str] | None = None,
    sites: str | Sequence[str] = (),
    mode: Mode = "denoising",
    layers: Any = "all",
    positions: Any = "all",
    heads: Any = None,
    neurons: Any = None,
    together: Sequence[str] = (),
    cumulative: bool = False,
    metric: Any = "logit_diff",
    statistics: Mapping[str, Any] | None = None,
    threshold: float | None = None,
    split: float | None = None,
    memory: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    plot: bool | str | Path = False,
) -> xr.DataTree:
    """Activation patching from Python: the recipe's keys as arguments, the recipe's results.

    Args:
        model: a loaded model.
        pairs: one pair, or several, from `nsp.pair` (or mappings with its arguments); the name of a built-in set, a
            file of pairs, or a mapping as in the recipe ({"set": "ioi", "size": 50}).
        components: what is patched; resid_post, unless ``sites`` are given.
        sites, mode, layers, positions, heads, neurons, together, cumulative: as in the recipe.
        metric: a kind, a `Metric`, a ``module:function``, a mapping as in the recipe, or a list of these.
        statistics, threshold, split: of the report, as in the recipe.
        memory: budget, such as ``4GB``.
        out: where to keep the run as a store; None keeps it in memory alone.
        plot: show a figure of the first component's mean effect over pairs, or write it to a file (``"heads.png"``).

    Returns a tree with ``effects/<component>``, ``receipts/<component>``, ``baseline`` and ``inputs``; its report is
    ``tree.nsp.report()``.
    """
    check_place(plot)
    given: dict[str, Any] = {
        "kind": KIND,
        "pairs": _pairs(pairs),
        "mode": mode,
        "sites": as_list(sites),
        "layers": layers,
        "positions": positions,
        "heads": heads,
        "neurons": neurons,
        "together": as_list(together),
        "cumulative": cumulative,
        "metric": _metric_keys(metric),
        "statistics": {} if statistics is None else statistics,
        "threshold": threshold,
        "split": split,
        "memory": memory,
        "seed": seed,
    }
    if components is not None:
        given["components"] = as_list(components)
    job = prepare(model, checked(ActivationPatchingRecipe, given))
    tree = runner.results(job, out=out, force=force, progress=progress)
    if plot:
        show(patching_figure(tree), plot)
    return tree


def layer_recovery(
    model: Model,
    clean: PromptLike,
    corrupt: PromptLike,
    *,
    component: str = "resid_post",
    metric: Any = "kl",
    positions: Any = "last",
    answer: str | None = None,
    distractor: str | None = None,
    spans: Mapping[str, Any] | None = None,
    mode: Mode = "denoising",
    cumulative: bool = False,
    plot: bool | str | Path = False,
) -> xr.DataArray:
    """How much of the clean run each layer of a component brings back, in percent: dims (layer,).

    One pair, one component, one number a layer: all chosen positions (and all heads) are patched together. 0 is the
    base run and 100 the donor run; for a distance that is (d_base - d_patched) / d_base x 100.

    Args:
        model: a loaded model.
        clean, corrupt: the two prompts.
        component: what is patched: resid_post, attn_out, mlp_out, z, ...
        metric: as in `activation_patching`; ``kl`` needs no answer, ``logit_diff`` an answer and a distractor.
        positions: last, all, an index, a list, a span. With all positions resid_post is a full recovery at every
            layer, whatever the model.
        cumulative: patch the layers up to each layer together.
        plot: show a figure of it, or write it to a file (``"recovery.png"``).
    """
    check_place(plot)
    chosen = _metric_keys(metric)
    if isinstance(chosen, list) and len(chosen) != 1:
        raise InputError("layer_recovery takes one metric; activation_patching takes a list")
    if mode not in ("denoising", "noising"):
        raise InputError(f"layer_recovery: mode is denoising or noising, not {mode!r}")
    tree = activation_patching(
        model,
        make_pair(clean, corrupt, answer, distractor, spans=spans),
        components=component,
        metric=chosen,
        positions=positions,
        mode=mode,
        together=["position"],
        cumulative=cumulative,
    )
    effects = tree[f"effects/{component}"].to_dataset()
    name = next(str(name) for name in effects.data_vars if str(name).startswith("recovery_"))
    recovery = effects[name].isel(pair=0, drop=True)
    if plot:
        show(patching_figure(tree, name), plot)
    return recovery


def _pairs(pairs: PairsLike) -> Any:
    if isinstance(pairs, str) or (isinstance(pairs, Mapping) and not {"clean", "corrupt"} <= set(pairs)):
        return pairs
    given: list[Pair | Mapping[str, Any]] = [pairs] if isinstance(pairs, Pair | Mapping) else list(pairs)
    return [pair_keys(one) for one in given]


def pair_keys(pair: Pair | Mapping[str, Any]) -> dict[str, Any]:
    """A pair as the recipe writes it."""
    if not isinstance(pair, Pair):
        return dict(pair)
    spans = {
        name: {"clean": piece[0], "corrupt": piece[1]} if isinstance(piece, tuple) else piece for name, piece in pair.spans
    }
    plain = {"clean": pair.clean, "corrupt": pair.corrupt, "answer": pair.answer, "distractor": pair.distractor}
    return {**plain, "spans": spans, "name": pair.name}


def _metric_keys(metric: Any) -> Any:
    """A metric (or a list of them) as the recipe writes it."""
    if isinstance(metric, list | tuple):
        return [_metric_keys(one) for one in metric]
    if isinstance(metric, Metric):
        return metric.to_dict()
    return metric
