"""What rows, columns, tokens, pairs and prompts are called in figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

_LONGEST = 60


def visible(text: str) -> str:
    """A token with its spaces shown and its control characters escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text.replace(" ", "␣")
    )


def token_label(text: str, place: object) -> str:
    """A column's label: the token, then its position; "" for a position without a token."""
    return f"{visible(text)} {place}" if text else ""


def shortened(label: str, longest: int) -> str:
    """A label whose text is at most `longest` characters; a position behind it stays."""
    text, between, place = label.rpartition(" ")
    if not between or not place.lstrip("-").isdecimal():
        text, between, place = label, "", ""
    return (text if len(text) <= longest else text[: longest - 1] + "…") + between + place


def short(text: str, longest: int = _LONGEST) -> str:
    """A text on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def quoted_value(value: Any) -> str | None:
    """A detail of a cell: a number of four digits, a word with its spaces visible, a text on one line; None for none."""
    if isinstance(value, float | int | np.number):
        return f"{value:.4g}" if math.isfinite(value) else None
    text = str(value)
    return (short(text, 400) if " " in text.strip() or len(text) > 24 else visible(text)) or None


def index(values: xr.DataArray, dim: str) -> np.ndarray:
    """The labels along a dim; of directions that are multipliers, those."""
    if dim == "direction" and "multiplier" in values.coords:
        return np.asarray(values["multiplier"].values)
    return np.asarray(values[dim].values if dim in values.coords else np.arange(values.sizes[dim]))


def axis_name(values: xr.DataArray, dim: str) -> str:
    """What a dim is called on an axis."""
    return "multiplier" if dim == "direction" and "multiplier" in values.coords else dim


def group(tree: xr.DataTree, path: str) -> xr.Dataset:
    """A group's variables; none where the run has no such group."""
    try:
        return tree[path].to_dataset()
    except KeyError:
        return xr.Dataset()


def item_names(tree: xr.DataTree, values: xr.DataArray | xr.Dataset, outer: str) -> list[str]:
    """What each pair or prompt is called: its number with its name, its source and template, or its text."""
    inputs = group(tree, "inputs")
    labels = [f"{outer} {label}" for label in (values[outer].values if outer in values.coords else range(values.sizes[outer]))]
    parts = [values.coords[name] for name in ("source", "template", "set") if name in values.coords]
    if not parts:
        parts = [inputs[name] for name in ("pair_name", "text") if name in inputs][:1]
    parts = [part for part in parts if part.dims == (outer,) and part.size == len(labels)]
    texts = [" · ".join(str(part.values[row]) for part in parts) for row in range(len(labels))]
    return [label if text in ("", label) else f"{label}: {short(text)}" for label, text in zip(labels, texts, strict=True)]


def meaning_and_units(values: xr.DataArray) -> dict[str, Any]:
    """What a variable is and its units, as a panel has them."""
    units = str(values.attrs.get("units") or "")
    return {"meaning": str(values.attrs.get("long_name", values.name)), "units": "" if units == "1" else units}


def cell_text(cell: Any) -> str:
    """A table's cell on one line: three decimals for a fraction, a dash for nothing, control characters escaped."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.3f}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(cell))
