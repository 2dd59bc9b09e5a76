"""The prompts of a bias scan: both sentences of every pair, as both models read them, shortest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xarray as xr

from nsp.datasets.bias_pairs import BadRow, BiasPair
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.scoring import continuation_logprobs
from nsp.engine.token_pairing import Paired, pair_prompts
from nsp.errors import InputError
from nsp.experiments.labels import given_variable, prompts_dataset, text_array
from nsp.model import Model

SIDES = ("more", "less")


class SentenceIds(NamedTuple):
    """A sentence's token ids as they are scored: those whose log-probabilities make up its score, and what comes before."""

    prefix: tuple[int, ...]
    scored: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ScanPrompt:
    """One sentence of a pair.

    Attributes:
        number: its pair's place in the data, from 0; ``side`` more or less.
        aligned, base: its token ids by the tokenizer of either model.
    """

    pair: BiasPair
    number: int
    side: str
    paired: Paired
    aligned: SentenceIds
    base: SentenceIds


def scan_prompts(aligned: Model, base: Model, pairs: Sequence[BiasPair]) -> list[ScanPrompt]:
    """Every sentence, encoded and aligned; prompts of like length stand together, so that they run together."""
    prompts = []
    for number, pair in enumerate(pairs):
        for side in SIDES:
            text = pair.more if side == "more" else pair.less
            try:
                paired = pair_prompts(aligned.encode(text), base.encode(text))
                ids = [sentence_ids(model, text) for model in (aligned, base)]
            except InputError as error:
                raise InputError(f"{pair.origin or pair.pair_id}: {error}") from None
            prompts.append(ScanPrompt(pair, number, side, paired, *ids))
    return sorted(prompts, key=lambda item: len(item.paired.base))


def sentence_ids(model: Model, text: str) -> SentenceIds:
    """A sentence's token ids, for `sentence_logprobs`.

    Before it comes the beginning-of-text token, or the end-of-text token where a tokenizer has no other, so that the
    first word is scored too; where there is neither, the sentence's own first token, which then is not scored.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, so sentences cannot be scored")
    ids = tuple(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise InputError(f"the sentence {text!r:.40} has no token")
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if isinstance(token, int):
            return SentenceIds((token,), ids)
    return SentenceIds(ids[:1], ids[1:])


def sentence_logprobs(
    model: Model, sentences: Sequence[SentenceIds], fixed: FixedInterventions | None = None
) -> np.ndarray:
    """The sum of the log-probabilities of each sentence's tokens, in nats, (sentence,); with ``fixed`` in force."""
    prefixes, scored = [sentence.prefix for sentence in sentences], [sentence.scored for sentence in sentences]
    parts = continuation_logprobs(model.runtime, prefixes, scored, fixed=fixed)
    return np.array([part.sum() for part in parts], dtype=np.float64)


def scan_inputs(prompts: Sequence[ScanPrompt], bad: Sequence[BadRow]) -> xr.Dataset:
    """The ``inputs`` of a bias scan's store, dims (prompt, position)."""
    dataset = prompts_dataset(
        [item.paired.base for item in prompts], names=[f"{item.pair.pair_id}-{item.side}" for item in prompts]
    )
    pairs = [item.pair for item in prompts]
    texts = {
        "pair_id": ("id of the pair in its file", [pair.pair_id for pair in pairs]),
        "side": ("more or less stereotyping sentence of the pair", [item.side for item in prompts]),
        "bias_type": ("type of bias", [pair.bias_type for pair in pairs]),
        "direction": ("stereo or antistereo, where the file says so", [pair.direction for pair in pairs]),
        "language": ("language, where the file says so", [pair.language for pair in pairs]),
        "subset": ("part of the data, where the file says so", [pair.subset for pair in pairs]),
        "origin": ("file and line", [pair.origin for pair in pairs]),
    }
    counts = {
        "pair_number": ("place of the pair in the data, from 0", [item.number for item in prompts]),
        "n_shared": ("tokens that end where one of the aligned model's does", [len(item.paired.shared) for item in prompts]),
        "n_scored": ("tokens that make up the sentence's log-probability", [len(item.base.scored) for item in prompts]),
    }
    columns = {name: (long_name, text_array(values)) for name, (long_name, values) in texts.items()}
    columns |= {name: (long_name, np.array(values, dtype=np.int64)) for name, (long_name, values) in counts.items()}
    variables = {name: given_variable(("prompt",), values, long_name, "given") for name, (long_name, values) in columns.items()}
    return dataset.assign(variables).assign_attrs({"bad_rows": len(bad), "bad_row_list": [str(row) for row in bad]})
