"""What a capture shows: statistics of each component, and the examples that a unit fires on."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.report.summary import Summary, SummaryTable

_TOP = 12
_AROUND = 4


def unit_statistics(tree: xr.DataTree, component: str) -> xr.Dataset:
    """Mean, standard deviation and maximum of every unit over all tokens of all prompts, dims (layer, neuron).

    For q, k, v and z the dims are (layer, head, neuron). Prompts that are not captured yet are left out.
    """
    group = _group(tree, component)
    weight = tree["inputs"]["n_tokens"].astype(np.float64)
    done = group["max_position"].isel({dim: 0 for dim in group["max_position"].dims if dim != "prompt"}) >= 0
    rows = np.flatnonzero(done.values)
    if not len(rows):
        raise InputError(f"{component}: no prompt has been captured yet")
    parts = []
    # A layer at a time, so that memory does not grow with the number of layers.
    for number in range(group.sizes["layer"]):
        one = group[["mean", "mean_square", "max"]].isel(prompt=rows, layer=[number]).load()
        share = weight.isel(prompt=rows)
        share = share / share.sum()
        mean = (one["mean"] * share).sum("prompt")
        square = (one["mean_square"] * share).sum("prompt")
        parts.append(xr.Dataset({"mean": mean, "std": np.sqrt((square - mean**2).clip(min=0)), "max": one["max"].max("prompt")}))
    return xr.concat(parts, "layer")


def top_examples(tree: xr.DataTree, component: str, layer: int, unit: int, *, head: int | None = None, k: int = 10) -> xr.Dataset:
    """The ``k`` prompts on which a unit is largest, with the token where it peaks.

    Returns a Dataset with dim prompt, largest first: ``max``, ``max_position``, ``token`` and ``context`` (the tokens
    around the peak, which stands between « and »).
    """
    group = _group(tree, component)
    at: dict[str, Any] = {"layer": layer, "neuron": unit} | ({"head": head} if head is not None else {})
    if "head" in group.dims and head is None:
        raise InputError(f"{component} has heads; name one with head=")
    try:
        found = group[["max", "max_position"]].sel(at).load()
    except KeyError as error:
        raise InputError(f"{component}: this capture has no {error.args[0]}; it has {dict(group.sizes)}") from None
    order = [int(row) for row in np.argsort(-found["max"].values, kind="stable") if found["max_position"].values[row] >= 0]
    chosen = found.isel(prompt=order[:k])
    tokens = np.asarray(tree["inputs"].to_dataset()["token_text"].values)
    shown = [_shown(tokens[row], int(found["max_position"].values[row])) for row in order[:k]]
    how = {"units": "1", "method": "from the prompts' maxima"}
    return chosen.assign(
        token=("prompt", [token for token, _ in shown], {"long_name": "token at the peak", **how}),
        context=("prompt", [context for _, context in shown], {"long_name": "tokens around the peak", **how}),
    )


def _shown(tokens: np.ndarray, place: int) -> tuple[str, str]:
    before = "".join(tokens[max(0, place - _AROUND) : place])
    after = "".join(tokens[place + 1 : place + 1 + _AROUND])
    return str(tokens[place]), f"{before}«{tokens[place]}»{after}"


def summarise(tree: xr.DataTree) -> Summary:
    """Sizes, spread by component, and the units that stand out most on a single token."""
    inputs, model = tree["inputs"].to_dataset(), tree.attrs.get("model", {})
    recipe = tree.attrs.get("recipe_resolved", {})
    tokens = int(inputs["n_tokens"].sum())
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {inputs.sizes['prompt']} prompts, {tokens} tokens",
        "every value is kept" if recipe.get("keep") == "values" else "summaries of each prompt are kept, not the values",
    ]
    rows: list[tuple[Any, ...]] = []
    tables = []
    for name in tree["activations"].children:
        found = unit_statistics(tree, name)
        rows += [
            (name, int(layer), float(one["mean"].mean()), float(one["std"].mean()), float(one["max"].max()))
            for layer, one in ((value, found.sel(layer=value)) for value in found["layer"].values)
        ]
        tables.append(_standing_out(tree, name, found))
    columns = ("component", "layer", "mean", "mean std of a unit", "largest value")
    return Summary("capture", tuple(lines), (*tables, SummaryTable("by layer, over all tokens", columns, tuple(rows))))


def _standing_out(tree: xr.DataTree, name: str, found: xr.Dataset) -> SummaryTable:
    """Units by how many standard deviations their largest value lies above their mean."""
    score = ((found["max"] - found["mean"]) / found["std"].where(found["std"] > 0)).fillna(0.0)
    flat = score.values.reshape(-1)
    rows = []
    for index in np.argsort(-flat, kind="stable")[:_TOP]:
        place = dict(zip(map(str, score.dims), np.unravel_index(int(index), score.shape), strict=True))
        labels = {dim: int(score[dim].values[at]) for dim, at in place.items()}
        best = top_examples(tree, name, labels["layer"], labels["neuron"], head=labels.get("head"), k=1)
        rows.append((*labels.values(), float(best["max"][0]), float(flat[index]), str(best["context"].values[0])))
    columns = (*map(str, score.dims), "largest value", "in std above mean", "where")
    return SummaryTable(f"{name}: units that stand out most on one token", columns, tuple(rows))


def _group(tree: xr.DataTree, component: str) -> xr.Dataset:
    captured = tree["activations"].children if "activations" in tree.children else {}
    if component not in captured:
        raise InputError(f"this run captured {', '.join(captured) or 'nothing'}, not {component}")
    return captured[component].to_dataset(inherit=True)
