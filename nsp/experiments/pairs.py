"""Paired scans of bias and alignment, the door from Python: scans, the CrowS-Pairs score, and overlaps of neurons."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from nsp.datasets.bias_files import read_bias_pairs, shipped_pairs
from nsp.datasets.bias_pairs import BiasPair, BiasPairs, select_pairs
from nsp.experiments import alignment_scan, bias_scan
from nsp.experiments.alignment_scan.select import Overlap, alignment_neurons, overlap
from nsp.experiments.bias_scan.prompts import sentence_ids, sentence_logprobs
from nsp.experiments.bias_scan.tables import Score, crows_score, csv_tables
from nsp.experiments.labels import given_variable, index_coord, text_array
from nsp.model import Model

__all__ = [
    "BiasPair",
    "BiasPairs",
    "Overlap",
    "Score",
    "alignment_neurons",
    "alignment_scan",
    "bias_scan",
    "crows_score",
    "csv_tables",
    "overlap",
    "pair_gap",
    "read_bias_pairs",
    "select_pairs",
    "shipped_pairs",
]


def pair_gap(model: Model, pairs: Sequence[BiasPair]) -> xr.Dataset:
    """The log-probability of both sentences of every pair, and their gap; dims (pair,).

    A sentence's log-probability is the sum over its tokens, each given the beginning-of-text token and the tokens before
    it. ``crows_score(dataset["gap"].values)`` is the CrowS-Pairs score.
    """
    ids = [sentence_ids(model, text) for pair in pairs for text in (pair.more, pair.less)]
    more, less = sentence_logprobs(model, ids).reshape(-1, 2).T
    attrs = {"units": "nats", "method": "sum over the tokens of the sentence after the beginning-of-text token"}
    values = {
        "logprob_more": (more, "log-probability of the more stereotyping sentence"),
        "logprob_less": (less, "log-probability of the less stereotyping sentence"),
        "gap": (more - less, "more less less"),
    }
    variables = {
        name: xr.Variable(("pair",), sums, {"long_name": text, **attrs}) for name, (sums, text) in values.items()
    }
    for name, text in (("bias_type", "type of bias"), ("pair_id", "id of the pair")):
        variables[name] = given_variable(("pair",), text_array([getattr(pair, name) for pair in pairs]), text, "given")
    return xr.Dataset(variables, {"pair": index_coord("pair", len(pairs), "pair, from 0")})
