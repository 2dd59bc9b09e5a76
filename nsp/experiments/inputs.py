"""The ``inputs`` of a store: prompts with their tokens, labelled alike by every experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.prompts import Prompt

_GIVEN = {"units": "1", "method": "given, encoded by the model's tokenizer"}


def index_coord(dim: str, values: Any, long_name: str) -> xr.Variable:
    """An integer coordinate of one dim; ``values`` are its labels, or how many there are from 0."""
    labels = np.arange(values) if isinstance(values, int) else np.asarray(values, dtype=np.int64)
    return xr.Variable((dim,), labels, {"long_name": long_name})


def text_array(texts: Sequence[str]) -> np.ndarray:
    """Texts as an object array with one axis, as stores keep them."""
    array = np.empty(len(texts), dtype=object)
    array[:] = list(texts)
    return array


def prompts_dataset(prompts: Sequence[Prompt], *, dim: str = "prompt", names: Sequence[str] | None = None) -> xr.Dataset:
    """Prompts as a Dataset.

    Variables ``text`` and ``name`` with dims (dim), ``n_tokens`` (dim), ``token_id`` (-1: none) and ``token_text`` with
    dims (dim, position). ``dim`` is ``prompt`` or ``pair``.
    """
    count, width = len(prompts), max((len(prompt) for prompt in prompts), default=0)
    ids = np.full((count, width), -1, dtype=np.int64)
    texts = np.full((count, width), "", dtype=object)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt.token_ids
        texts[row, : len(prompt)] = prompt.token_texts
    whole = text_array([prompt.text if prompt.text is not None else "".join(prompt.token_texts) for prompt in prompts])
    given = list(names) if names is not None else [f"{dim} {number}" for number in range(count)]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    variables = {
        "text": ((dim,), whole, {"long_name": "prompt", **_GIVEN}),
        "name": ((dim,), text_array(given), {"long_name": f"name of the {dim}", **_GIVEN}),
        "n_tokens": ((dim,), lengths, {"long_name": "length of the prompt in tokens", **_GIVEN}),
        "token_id": ((dim, "position"), ids, {"long_name": "token ids (-1: none)", **_GIVEN}),
        "token_text": ((dim, "position"), texts, {"long_name": "tokens of the prompt", **_GIVEN}),
    }
    coords = {dim: index_coord(dim, count, f"{dim}, from 0"), "position": index_coord("position", width, "position")}
    return xr.Dataset(variables, coords)
