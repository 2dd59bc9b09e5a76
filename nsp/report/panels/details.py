"""What a cell says besides its value: receipts, a lens's most likely tokens, the text that a patch gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr

from nsp.report.panels.labels import group, short, visible
from nsp.report.panels.shapes import Cells, numbers

_TEXTS = 3  # texts of a cell that are told of a mean
_LONGEST = 70


def details(tree: xr.DataTree, path: str, values: xr.DataArray) -> dict[str, xr.DataArray]:
    """What else lies along the same cells as ``values``, by what it is called."""
    found: dict[str, xr.DataArray] = {}
    for name, source in _sources(tree, path):
        single = [dim for dim in source.dims if source.sizes[dim] == 1 and dim not in values.dims]
        array = source.squeeze(single, drop=True)
        if set(array.dims) == set(values.dims) and all(array.sizes[dim] == values.sizes[dim] for dim in array.dims):
            found[name] = array.load().transpose(*values.dims)
    return found


def averaged_details(parts: Mapping[str, xr.DataArray], outer: str, names: list[str]) -> dict[str, xr.DataArray]:
    """What a mean over pairs or prompts says: means of the receipts, and the first texts."""
    found: dict[str, xr.DataArray] = {}
    for name, part in parts.items():
        if part.dtype.kind in "fiub":
            found[f"{name}, mean"] = part.mean(outer, skipna=True)
        elif name == "text":
            labels = [label.partition(": ")[2] or label for label in names]
            rows = part.transpose(outer, ...).values.reshape(part.sizes[outer], -1)
            told = ["; ".join(_quoted(labels, rows[:, at])) for at in range(rows.shape[1])]
            rest = part.isel({outer: 0}, drop=True)
            found["texts"] = rest.copy(data=np.array(told, dtype=object).reshape(rest.shape))
    return found


def _quoted(labels: list[str], texts: np.ndarray) -> list[str]:
    told = [f"{label}: “{short(str(text), _LONGEST)}”" for label, text in zip(labels, texts, strict=True) if str(text)]
    return told[:_TEXTS] + ([f"and {len(told) - _TEXTS} more"] if len(told) > _TEXTS else [])


def _sources(tree: xr.DataTree, path: str) -> Iterator[tuple[str, xr.DataArray]]:
    top, _, component = path.partition("/")
    if top != "effects":
        return
    receipts = group(tree, f"receipts/{component}")
    for name, label in (("change_norm", "changed by"), ("fired", "writes")):
        if name in receipts:
            yield label, receipts[name].where(receipts[name] >= 0).astype(float)
    texts = group(tree, "generations")
    name = "text" if component == "patch" else f"text_{component}"
    if name in texts:
        yield "text", texts[name]


def plain(values: xr.DataArray) -> Cells:
    """A grid of what a detail holds: numbers of four digits, or texts with their spaces visible."""
    rows = np.atleast_2d(np.asarray(values.values))
    if values.dtype.kind in "fiub":
        return [numbers(row) for row in rows]
    return [[_text(cell) for cell in row] for row in rows]


def _text(cell: object) -> str | None:
    text = str(cell)
    # A token shows its spaces; a sentence is read.
    return (visible(text) if len(text) <= 24 else short(text, 400)) or None
