"""Paired scans of bias and alignment, the door from Python: scans, the CrowS-Pairs score, and overlaps of neurons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from nsp.datasets.bias_files import read_bias_pairs, shipped_pairs
from nsp.datasets.bias_pairs import BiasPair, BiasPairs, select_pairs
from nsp.engine.scoring import continuation_logprobs
from nsp.experiments.alignment_scan.job import alignment_neurons, alignment_scan
from nsp.experiments.alignment_scan.select import Overlap, overlap
from nsp.experiments.bias_scan.job import bias_scan
from nsp.experiments.bias_scan.prompts import sentence_ids
from nsp.experiments.bias_scan.tables import Score, crows_score, csv_tables
from nsp.experiments.labels import index_coord, text_array
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
    texts = [text for pair in pairs for text in (pair.more, pair.less)]
    ids = [sentence_ids(model, text) for text in texts]
    found = continuation_logprobs(model.runtime, [one[0] for one in ids], [one[1] for one in ids])
    sums = np.array([part.sum() for part in found]).reshape(-1, 2)
    how = {"units": "nats", "method": "sum over the tokens of the sentence after the beginning-of-text token"}
    given = {"units": "1", "method": "given"}
    variables = {
        "logprob_more": (
            ("pair",),
            sums[:, 0],
            {"long_name": "log-probability of the more stereotyping sentence", **how},
        ),
        "logprob_less": (
            ("pair",),
            sums[:, 1],
            {"long_name": "log-probability of the less stereotyping sentence", **how},
        ),
        "gap": (("pair",), sums[:, 0] - sums[:, 1], {"long_name": "more less less", **how}),
        "bias_type": (
            ("pair",),
            text_array([pair.bias_type for pair in pairs]),
            {"long_name": "type of bias", **given},
        ),
        "pair_id": (("pair",), text_array([pair.pair_id for pair in pairs]), {"long_name": "id of the pair", **given}),
    }
    return xr.Dataset(variables, {"pair": index_coord("pair", len(pairs), "pair, from 0")})
