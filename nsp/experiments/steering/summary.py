"""What steering did, as tables: from its store alone."""

from __future__ import annotations

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
        texts = tree["generations"].to_dataset()
        tables += [_text_table(inputs, texts, prompt) for prompt in range(min(_TEXTS, inputs.sizes["prompt"]))]
    return Summary("steering", tuple(lines), tuple(tables))


def _description(tree: xr.DataTree) -> str:
    for group in ("activations", "circuit"):
        for node in tree[group].children.values() if group in tree.children else ():
            if "description" in node.attrs:
                return str(node.attrs["description"])
    return "steering"


def _strength_table(tree: xr.DataTree, effects: xr.Dataset) -> SummaryTable:
    """Means over prompts, a row a multiplier."""
    columns = {"multiplier": effects["multiplier"].values, "KL next token": _mean(effects["kl"])}
    if "tokens" in tree["effects"].children:
        tokens = tree["effects/tokens"].to_dataset()
        for number, text in enumerate(tokens["token_text"].values.tolist()):
            columns[f"P({text!r})"] = _mean(tokens["prob"].isel(token=number))
    if "generations" in tree.children:
        texts = tree["generations"].to_dataset()
        columns |= {name: _mean(texts[name]) for name in ("perplexity", "repetition")}
        columns["texts unchanged"] = _unchanged(texts, tree["receipts/steering"].to_dataset())
    return SummaryTable.of("means over prompts", columns)


def _unchanged(texts: xr.Dataset, receipts: xr.Dataset) -> np.ndarray:
    """The share of prompts whose text is that of the multiplier which changes nothing, (direction,)."""
    ids = texts["token_id"].transpose("prompt", "direction", "step").values
    neutral = int(receipts["fired"].max("prompt").values.argmin())
    same: np.ndarray = (ids == ids[:, neutral : neutral + 1]).all(axis=2).mean(axis=0)
    return same


def _next_table(inputs: xr.Dataset, effects: xr.Dataset) -> SummaryTable:
    first = effects.isel(prompt=0, token=slice(_TOKENS)).transpose("direction", "token")
    likely = [
        ", ".join(f"{text!r} {prob:.3f}" for text, prob in zip(*ranked, strict=True))
        for ranked in zip(first["top_text"].values, first["top_prob"].values, strict=True)
    ]
    title = f"next tokens after {_cut(inputs['text'].values[0])!r}"
    return SummaryTable.of(title, {"multiplier": effects["multiplier"].values, "most likely": likely})


def _text_table(inputs: xr.Dataset, texts: xr.Dataset, prompt: int) -> SummaryTable:
    of_prompt = texts.isel(prompt=prompt)
    columns = {name: of_prompt[name].values for name in ("multiplier", "perplexity", "repetition")}
    title = f"texts after {_cut(inputs['text'].values[prompt])!r}"
    return SummaryTable.of(title, {**columns, "text": [_cut(str(text)) for text in of_prompt["text"].values]})


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _mean(values: xr.DataArray) -> np.ndarray:
    mean: np.ndarray = values.mean("prompt", skipna=True).values
    return mean
