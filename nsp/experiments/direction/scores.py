"""How far a behaviour shows: the log-odds of openings at a reply's first token, and the rate in generated texts.

``score = log P - log(1 - P)``, with P the probability that the reply's first token is the first token of one of the
openings (Arditi et al. 2024, section 2.3 and appendix B). It is read from the model's own next-token distribution,
logits and all, never from a product of a residual direction with anything of the vocabulary's size.

Limits: openings that begin alike are one first token, and a first token such as "I" also begins other replies; the rate
in generated texts says whether the log-odds mean what they should.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.engine import Engine
from nsp.engine.request import Request
from nsp.errors import InputError
from nsp.experiments.direction.recipe import BehaviourOptions
from nsp.interventions import Intervention
from nsp.metrics import Metric, kl
from nsp.progress import BranchProgress
from nsp.statistics.proportion import wilson_interval

SCORE = "log_odds"
SCORE_NAME, SCORE_UNITS = "log-odds that the reply's first token opens with the behaviour", "nats"
CONDITIONS = ("baseline", "ablated", "added")
"""How the test prompts are run: as they are, with the direction ablated, with it added."""
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"'})


@dataclass(frozen=True)
class Opening:
    """The first token of one or more openings."""

    token_id: int
    text: str
    openings: tuple[str, ...]


def first_tokens(tokenizer: Any, openings: Iterable[str]) -> tuple[Opening, ...]:
    """The distinct first tokens of the openings, as a reply begins with them."""
    openings_of: dict[int, list[str]] = {}
    for opening in openings:
        ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"openings: {opening!r} has no token")
        openings_of.setdefault(int(ids[0]), []).append(opening)
    return tuple(Opening(token, tokenizer.decode([token]), tuple(texts)) for token, texts in openings_of.items())


@dataclass(frozen=True)
class Scores:
    """Scores of prompts under an intervention, axis (prompt,): ``score``, ``base`` without it, ``kl`` from that run."""

    score: np.ndarray
    base: np.ndarray
    kl: np.ndarray


def score_request(
    prompts: Sequence[Prompt],
    openings: Sequence[Opening],
    *,
    fixed: Sequence[Intervention] = (),
    swept: Sequence[Intervention] = (),
    with_kl: bool = True,
) -> Request:
    """The request that scores prompts. ``swept`` are of one layer: they take the branch path, which skips those below."""
    ids = torch.tensor([[opening.token_id for opening in openings]] * len(prompts))
    metrics = (Metric("log_odds", name=SCORE), *((kl(reference="base"),) if with_kl else ()))
    return Request(
        bases=tuple(prompts),
        swept=tuple(swept),
        fixed=tuple(fixed),
        axes=("layer",) if swept else (),
        metrics=metrics,
        tokens=(ids, *((None,) if with_kl else ())),
    )


def run_scores(engine: Engine, request: Request, progress: BranchProgress | None = None) -> Scores:
    """Run a `score_request`."""
    outcome = engine.measure(engine.plan(request), progress=progress)
    values = [value[:, 0, 0, 0] for value in outcome.values]
    return Scores(values[0], outcome.base[0], values[1] if len(values) > 1 else np.full_like(values[0], np.nan))


def shows(text: str, behaviour: BehaviourOptions) -> bool:
    """Whether a generated text shows the behaviour. Case and curly quotes make no difference."""
    said = _plain(text).lstrip()
    if not behaviour.phrases:
        return any(said.startswith(_plain(opening).lstrip()) for opening in behaviour.openings)
    phrases = [_plain(phrase) for phrase in behaviour.phrases]
    if behaviour.match == "start":
        held = [phrase for phrase in phrases if said.startswith(phrase.lstrip())]
    elif behaviour.match == "words":
        held = [phrase for phrase in phrases if re.search(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", said)]
    else:
        held = [phrase for phrase in phrases if phrase in said]
    return len(held) >= behaviour.at_least


def _plain(text: str) -> str:
    return text.translate(_QUOTES).casefold()


def rate(shown: Sequence[bool] | np.ndarray) -> tuple[int, int, float, float]:
    """How many of how many texts show it, and the ends of the 95% interval (Wilson) of the rate."""
    count, total = int(np.sum(shown)), len(shown)
    low, high = wilson_interval(count / max(1, total), total)
    return count, total, float(low), float(high)
