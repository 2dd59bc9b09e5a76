"""Whether generated text is still text: repetition of its tokens, and how likely the unsteered model finds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nsp.engine.runtime import Runtime
from nsp.engine.scoring import continuation_logprobs


def distinct(tokens: Sequence[int], n: int) -> float:
    """Distinct-n: different n-grams over n-grams (Li et al. 2016); 1 repeats nothing, NaN for a text shorter than n."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """Share of the n-grams that occur in the text more than once; 0 repeats nothing, NaN for a text shorter than n."""
    grams = _grams(tokens, n)
    if not grams:
        return float("nan")
    return sum(count for count in Counter(grams).values() if count > 1) / len(grams)


def perplexities(runtime: Runtime, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Perplexity of each text after its prompt in the model without interventions: exp of the mean negative
    log-probability of a token, (text,); NaN for an empty text.
    """
    scores = continuation_logprobs(runtime, prompts, texts)
    return np.array([float(np.exp(-score.mean())) if len(score) else np.nan for score in scores])


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
