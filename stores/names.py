"""Group names and texts that every backend can hold, and the way back.

Component names may hold characters that file systems and zarr dislike (`module:model.layers.3.mlp.gate_proj`): in a
store they are percent-encoded, and the reader gives the true names back. Texts must be valid Unicode: a lone surrogate
is written as its backslash escape (token ids, not texts, are the authority on what a model saw).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import xarray as xr


def stored_path(path: str) -> str:
    """The group path as it stands in a store: `effects/module:a.b` -> `effects/module%3Aa.b`."""
    return "/".join(quote(part, safe="") for part in path.strip("/").split("/"))


def true_path(path: str) -> str:
    """The group path as a user knows it; the inverse of `stored_path`."""
    return "/".join(unquote(part) for part in path.strip("/").split("/"))


def clean_text(text: str) -> str:
    """`text` with lone surrogates written as backslash escapes; any other text is unchanged."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def clean_json(value: Any) -> Any:
    """`value` with every text in it, keys too, passed through `clean_text`."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_json(key): clean_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean_json(item) for item in value]
    return value


def is_text(dtype: Any) -> bool:
    """Whether a variable of this dtype holds texts."""
    return isinstance(dtype, np.dtypes.StringDType) or getattr(dtype, "kind", "O") in "OU"


def text_values(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`values` as objects of clean text, which zarr stores as variable-length UTF-8. None becomes ''."""
    cleaned = np.empty(values.shape, dtype=object)
    for place, value in np.ndenumerate(np.asarray(values, dtype=object)):
        cleaned[place] = "" if value is None or value is np.nan else clean_text(str(value))
    return cleaned


def text_variable(variable: xr.Variable) -> xr.Variable:
    """`variable` with its values as `text_values`."""
    return xr.Variable(variable.dims, text_values(np.asarray(variable.values)), variable.attrs)
