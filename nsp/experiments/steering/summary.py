"""What steering did, as tables: from its store alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsp.report.summary import Summary, SummaryTable

_TEXTS = 3  # prompts whose texts are shown
_SHOWN = 160  # characters of a text
_TOKENS = 5


def summarise(tree: xr.DataTree) -> Summary:
    """Numbers a multiplier, and the first prompts' texts."""
    inputs = tree["inputs"].to_dataset()
    effects = tree["effects/next_token"].to_dataset()
    model, recipe = tree.attrs.get("model", {}), tree.attrs.get("recipe_resolved", {})
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {inputs.sizes['prompt']} prompt(s), "
        f"{effects.sizes['direction']} multipliers",
        f"{_description(tree)}; positions {recipe.get('positions', '?')}",
    ]
    tables = [_strength_table(tree, effects), _next_table(inputs, effects)]
    if "generations" in tree.children:
        made = tree["generations"].to_dataset()
        tables += [_text_table(inputs, made, prompt) for prompt in range(min(_TEXTS, inputs.sizes["prompt"]))]
    return Summary("steering", tuple(lines), tuple(tables))


def _description(tree: xr.DataTree) -> str:
    for group in ("activations", "circuit"):
        for node in tree[group].children.values() if group in tree.children else ():
            if "description" in node.attrs:
                return str(node.attrs["description"])
    return "steering"


def _strength_table(tree: xr.DataTree, effects: xr.Dataset) -> SummaryTable:
    """Means over prompts, a row a multiplier."""
    columns: list[tuple[str, np.ndarray]] = [("KL next token", _mean(effects["kl"]))]
    if "tokens" in tree["effects"].children:
        tokens = tree["effects/tokens"].to_dataset()
        for number, text in enumerate(tokens["token_text"].values.tolist()):
            columns.append((f"P({text!r})", _mean(tokens["prob"].isel(token=number))))
    if "generations" in tree.children:
        made = tree["generations"].to_dataset()
        columns += [("perplexity", _mean(made["perplexity"])), ("repetition", _mean(made["repetition"]))]
        columns.append(("texts unchanged", _unchanged(made, tree["receipts/steering"].to_dataset())))
    rows = [
        (float(multiplier), *(float(values[row]) for _, values in columns))
        for row, multiplier in enumerate(effects["multiplier"].values)
    ]
    return SummaryTable("means over prompts", ("multiplier", *(name for name, _ in columns)), tuple(rows))


def _unchanged(made: xr.Dataset, receipts: xr.Dataset) -> np.ndarray:
    """The share of prompts whose text is that of the multiplier which changes nothing, (direction,)."""
    ids = made["token_id"].transpose("prompt", "direction", "step").values
    neutral = int(receipts["fired"].max("prompt").values.argmin())
    same: np.ndarray = (ids == ids[:, neutral : neutral + 1]).all(axis=2).mean(axis=0)
    return same


def _next_table(inputs: xr.Dataset, effects: xr.Dataset) -> SummaryTable:
    rows = []
    for row, multiplier in enumerate(effects["multiplier"].values):
        texts, probs = (effects[key].isel(prompt=0, direction=row).values[:_TOKENS] for key in ("top_text", "top_prob"))
        rows.append((float(multiplier), ", ".join(f"{text!r} {prob:.3f}" for text, prob in zip(texts, probs, strict=True))))
    return SummaryTable(f"next tokens after {_cut(inputs['text'].values[0])!r}", ("multiplier", "most likely"), tuple(rows))


def _text_table(inputs: xr.Dataset, made: xr.Dataset, prompt: int) -> SummaryTable:
    rows: list[tuple[Any, ...]] = []
    one = made.isel(prompt=prompt)
    for row, multiplier in enumerate(one["multiplier"].values):
        numbers = (float(one[key].values[row]) for key in ("perplexity", "repetition"))
        rows.append((float(multiplier), *numbers, _cut(str(one["text"].values[row]))))
    title = f"texts after {_cut(inputs['text'].values[prompt])!r}"
    return SummaryTable(title, ("multiplier", "perplexity", "repetition", "text"), tuple(rows))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _mean(values: xr.DataArray) -> np.ndarray:
    found: np.ndarray = values.mean("prompt", skipna=True).values
    return found
