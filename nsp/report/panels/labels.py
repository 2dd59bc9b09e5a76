"""What rows, columns, pairs and prompts are called on a page."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

_LONGEST = 60


def group(tree: xr.DataTree, path: str) -> xr.Dataset:
    """A group's variables; none where the run has no such group."""
    try:
        return tree[path].to_dataset()
    except KeyError:
        return xr.Dataset()


def visible(text: str) -> str:
    """A token with its spaces visible."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text.replace(" ", "␣"))


def short(text: str, longest: int = _LONGEST) -> str:
    """A text on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def names(tree: xr.DataTree, values: xr.DataArray, outer: str) -> list[str]:
    """What each pair or prompt is called: its number with its name, its source and template, or its text."""
    inputs = group(tree, "inputs")
    labels = [f"{outer} {label}" for label in values[outer].values]
    parts = [values.coords[name] for name in ("source", "template", "set") if name in values.coords]
    if not parts:
        found = next((inputs[name] for name in ("pair_name", "text") if name in inputs), None)
        parts = [] if found is None else [found]
    parts = [part for part in parts if part.dims == (outer,) and part.size == len(labels)]
    texts = [" · ".join(str(part.values[row]) for part in parts) for row in range(len(labels))]
    return [
        label if text in ("", label) else f"{label}: {short(text)}" for label, text in zip(labels, texts, strict=True)
    ]


def index(values: xr.DataArray, dim: str) -> Any:
    """The labels along a dim; of directions that are multipliers, those."""
    if dim == "direction" and "multiplier" in values.coords:
        return values["multiplier"].values
    return values[dim].values if dim in values.coords else np.arange(values.sizes[dim])


def tokens(tree: xr.DataTree, dataset: xr.Dataset, values: xr.DataArray) -> xr.DataArray | None:
    """The tokens at the positions: of the group itself, else of the inputs where these have the same positions."""
    if "token_text" in dataset.coords:
        return dataset["token_text"]
    texts = group(tree, "inputs").get("token_text")
    if texts is None or any(texts.sizes[dim] != values.sizes.get(dim) for dim in texts.dims):
        return None
    same = all(np.array_equal(texts[dim].values, values[dim].values) for dim in texts.dims)
    return texts if same else None


def columns(texts: xr.DataArray | None, values: xr.DataArray, x: str, outer: str | None) -> list[list[str]]:
    """The column labels of each pair or prompt (one list where there are none): tokens with their positions."""
    labels = [str(label) for label in index(values, x)]
    if x != "position" or texts is None or x not in texts.dims or set(texts.dims) - {x, outer}:
        return [labels]
    rows = texts.transpose(..., x).values.reshape(-1, len(labels))
    found = []
    for row in rows:
        shown = [visible(str(text)) for text in row]
        found.append([f"{text} {label}" if text else label for text, label in zip(shown, labels, strict=True)])
    return found
