"""The groups of a steering run's store, with dims (prompt, direction, ...): one direction a multiplier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.experiments.labels import index_coord, text_array

# (what it means, units, method; an empty method: the steering itself), (blank, dtype), extra dim
_Row = tuple[str, str, str, Any, Any, str]
_OWN = "of the generated tokens"
_PERPLEXITY = "exp of the mean negative log-probability of a generated token"
_NEXT: dict[str, _Row] = {
    "kl": ("KL(unsteered || steered) of the next-token distribution", "nats", "", np.nan, np.float32, ""),
    "top_id": ("most likely next tokens, by id", "1", "", -1, np.int64, "token"),
    "top_text": ("most likely next tokens", "1", "", "", object, "token"),
    "top_prob": ("their probabilities", "1", "", np.nan, np.float32, "token"),
}
_TOKENS: dict[str, _Row] = {
    "prob": ("probability as the next token", "1", "", np.nan, np.float32, "token"),
    "logprob": ("log-probability as the next token", "nats", "", np.nan, np.float32, "token"),
}
_TEXTS: dict[str, _Row] = {
    "text": ("generated text", "1", "", "", object, ""),
    "token_id": ("generated token ids (-1: the text has ended)", "1", "", -1, np.int64, "step"),
    "n_tokens": ("generated tokens (-1: not computed)", "1", "", -1, np.int32, ""),
    "perplexity": ("perplexity of the text in the unsteered model (NaN: no token)", "1", _PERPLEXITY, np.nan, np.float32, ""),
    "repetition": ("share of trigrams that stand in the text more than once (NaN: too short)", "1", _OWN, np.nan, np.float32, ""),
    "distinct_2": ("different bigrams over bigrams (NaN: too short)", "1", _OWN, np.nan, np.float32, ""),
}
_FIRED: dict[str, _Row] = {
    "fired": ("writes selected on the prompt (0: this multiplier changes nothing; -1: not computed)", "1", "", -1, np.int32, ""),
}


def results_template(
    prompts: int, multipliers: Sequence[float], tokens: Mapping[int, str], top_k: int, steps: int, method: str
) -> dict[str, xr.Dataset]:
    """The groups that a steering run fills, blank.

    ``tokens`` (id -> text) are those whose probabilities are kept, ``steps`` the tokens generated (0: none), ``method``
    how the texts came about.
    """
    common = {
        "prompt": index_coord("prompt", prompts, "prompt, from 0"),
        "direction": index_coord("direction", len(multipliers), "steered run, one a multiplier"),
        "multiplier": xr.Variable(("direction",), np.array(multipliers), {"long_name": "multiplier of the steering"}),
    }

    def made(rows: Mapping[str, _Row], extra: Mapping[str, xr.Variable]) -> xr.Dataset:
        coords = {**common, **extra}
        variables = {}
        for name, (text, units, how, blank, dtype, dim) in rows.items():
            dims = ("prompt", "direction", dim) if dim else ("prompt", "direction")
            shape = [coords[one].size for one in dims]
            attrs = {"long_name": text, "units": units, "method": how or method}
            variables[name] = (dims, np.full(shape, blank, dtype=dtype), attrs)
        return xr.Dataset(variables, coords)

    found = {
        "effects/next_token": made(_NEXT, {"token": index_coord("token", top_k, "rank among next tokens, from 0")}),
        "receipts/steering": made(_FIRED, {}),
    }
    if tokens:
        texts = xr.Variable(("token",), text_array(list(tokens.values())), {"long_name": "token"})
        found["effects/tokens"] = made(_TOKENS, {"token": index_coord("token", list(tokens), "token id"), "token_text": texts})
    if steps:
        found["generations"] = made(_TEXTS, {"step": index_coord("step", steps, "generated token, from 0")})
    return found
