"""The prompts of a bias scan: both sentences of every pair, as both models read them, shortest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.bias_pairs import BadRow, BiasPair
from nsp.engine.paired import Paired, pair_prompts
from nsp.errors import InputError
from nsp.experiments.labels import prompts_dataset, text_array
from nsp.model import Model

SIDES = ("more", "less")


@dataclass(frozen=True, eq=False)
class ScanPrompt:
    """One sentence of a pair.

    Attributes:
        number: its pair's place in the data, from 0; ``side`` more or less.
        scored: the token ids whose log-probabilities make up the sentence's score, by the aligned and the base
            tokenizer, and the ``prefix`` before them.
    """

    pair: BiasPair
    number: int
    side: str
    paired: Paired
    scored: tuple[tuple[int, ...], tuple[int, ...]]
    prefix: tuple[tuple[int, ...], tuple[int, ...]]


def scan_prompts(aligned: Model, base: Model, pairs: Sequence[BiasPair]) -> list[ScanPrompt]:
    """Every sentence, encoded and aligned; prompts of like length stand together, so that they run together."""
    found = []
    for number, pair in enumerate(pairs):
        for side in SIDES:
            text = pair.more if side == "more" else pair.less
            try:
                paired = pair_prompts(aligned.encode(text), base.encode(text))
                ids = tuple(sentence_ids(model, text) for model in (aligned, base))
            except InputError as error:
                raise InputError(f"{pair.origin or pair.pair_id}: {error}") from None
            (prefix_a, scored_a), (prefix_b, scored_b) = ids
            found.append(ScanPrompt(pair, number, side, paired, (scored_a, scored_b), (prefix_a, prefix_b)))
    return sorted(found, key=lambda item: len(item.paired.base))


def sentence_ids(model: Model, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(what stands before the sentence, the sentence's tokens), which `sentence_logprobs` scores.

    Before it stands the beginning-of-text token, or the end-of-text token where a tokenizer has no other, so that the
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
            return (token,), ids
    return ids[:1], ids[1:]


def scan_inputs(prompts: Sequence[ScanPrompt], bad: Sequence[BadRow]) -> xr.Dataset:
    """The ``inputs`` of a bias scan's store, dims (prompt, position)."""
    dataset = prompts_dataset(
        [item.paired.base for item in prompts], names=[f"{item.pair.pair_id}-{item.side}" for item in prompts]
    )
    given = {"units": "1", "method": "given"}

    def text(name: str, values: Sequence[str]) -> tuple[Any, ...]:
        return (("prompt",), text_array(values), {"long_name": name, **given})

    def count(name: str, values: Sequence[int]) -> tuple[Any, ...]:
        return (("prompt",), np.asarray(values, dtype=np.int64), {"long_name": name, **given})

    dataset = dataset.assign(
        pair_number=count("place of the pair in the data, from 0", [item.number for item in prompts]),
        pair_id=text("id of the pair in its file", [item.pair.pair_id for item in prompts]),
        side=text("more or less stereotyping sentence of the pair", [item.side for item in prompts]),
        bias_type=text("type of bias", [item.pair.bias_type for item in prompts]),
        direction=text("stereo or antistereo, where the file says so", [item.pair.direction for item in prompts]),
        language=text("language, where the file says so", [item.pair.language for item in prompts]),
        subset=text("part of the data, where the file says so", [item.pair.subset for item in prompts]),
        origin=text("file and line", [item.pair.origin for item in prompts]),
        n_shared=count(
            "tokens that end where one of the aligned model's does", [len(item.paired.shared) for item in prompts]
        ),
        n_scored=count("tokens that make up the sentence's log-probability", [len(item.scored[1]) for item in prompts]),
    )
    return dataset.assign_attrs({"bad_rows": len(bad), "bad_row_list": [str(row) for row in bad]})
