"""Which units tell two sets of prompts apart: mean difference, effect size, and a test corrected for all units.

The model: each prompt is one observation, and each site (layer, neuron) has one value per prompt. Sets that are paired
(prompt i of one with prompt i of the other) are tested by `nsp.statistics.sign_flip_test` on their differences; others
by permuting which set a prompt belongs to, all sites together, with Welch's t as the statistic. The false discovery
rate (``bh``, ``by``) needs p far below 1 / permutations where there are tens of thousands of sites, so it takes p of
Student's t (paired) or Welch's t, which assume that means are about normal.

Limits: a test says that a site's mean differs between *these kinds of* prompts, not that the model uses it. Prompts
that share words are no independent observations.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from nsp.errors import InputError
from nsp.statistics import sign_flip_test
from nsp.statistics.sign_flip import CORRECTIONS, Correction

# Cells of (permutation, site) that are held at once.
_CELLS = 2**22
# Rounding of a float32 statistic: values closer than this count as tied.
_TIE = 1e-5


@dataclass(frozen=True)
class TestOptions:
    """How sites are tested.

    Attributes:
        paired: whether prompt i of the one set belongs to prompt i of the other.
        correction: ``max-t`` (family-wise), ``bh`` or ``by`` (false discovery rate), ``none``.
        resamples: permutations or flips drawn; ``seed`` of the draw.
    """

    paired: bool = False
    correction: Correction = "max-t"
    resamples: int = 2000
    seed: int = 0
    __test__ = False  # pytest: not a test class


def contrast_statistics(positive: np.ndarray, negative: np.ndarray, options: TestOptions) -> dict[str, np.ndarray]:
    """Compare two sets of activations with dims (prompt, layer, neuron).

    Returns arrays with dims (layer, neuron): ``difference`` of the means (positive - negative), ``cohen_d`` (by the
    pooled standard deviation; NaN where it is zero), ``p`` and ``p_corrected`` (two-sided; NaN where not tested: fewer
    than two prompts in a set, or no variance).
    """
    if positive.shape[1:] != negative.shape[1:]:
        raise InputError(f"the two sets have sites of shapes {positive.shape[1:]} and {negative.shape[1:]}")
    if options.correction not in CORRECTIONS:
        raise InputError(f"correction is {options.correction!r}; take one of {', '.join(CORRECTIONS)}")
    if options.paired and len(positive) != len(negative):
        raise InputError(f"paired sets have equally many prompts, not {len(positive)} and {len(negative)}")
    high, low = positive.astype(np.float64), negative.astype(np.float64)
    difference = high.mean(axis=0) - low.mean(axis=0)
    if options.correction in ("bh", "by"):
        p, corrected = _parametric(high, low, options)
    elif options.paired:
        p, corrected = _paired(high - low, options)
    else:
        p, corrected = _permuted(high, low, options)
    return {"difference": difference, "cohen_d": cohen_d(high, low), "p": p, "p_corrected": corrected}


def cohen_d(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Difference of means in pooled standard deviations, over the first axis; NaN with fewer than two values per set, or
    where nothing varies (Cohen 1988).
    """
    count = len(high) + len(low) - 2
    if len(high) < 2 or len(low) < 2:
        return np.full(high.shape[1:], np.nan)
    squares = high.var(axis=0) * len(high) + low.var(axis=0) * len(low)
    pooled = np.sqrt(squares / count)
    difference = high.mean(axis=0) - low.mean(axis=0)
    return np.asarray(np.divide(difference, pooled, out=np.full(pooled.shape, np.nan), where=pooled > 0))


def _parametric(high: np.ndarray, low: np.ndarray, options: TestOptions) -> tuple[np.ndarray, np.ndarray]:
    shape = high.shape[1:]
    corrected = np.full(shape, np.nan)
    if min(len(high), len(low)) < 2:
        return corrected.copy(), corrected
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy says so where nothing varies; there p is NaN
        test = stats.ttest_rel(high, low) if options.paired else stats.ttest_ind(high, low, equal_var=False)
    p = np.asarray(test.pvalue)
    tested = np.isfinite(p)
    if tested.any():
        corrected[tested] = stats.false_discovery_control(p[tested], method=options.correction)
    return p, corrected


def _paired(difference: np.ndarray, options: TestOptions) -> tuple[np.ndarray, np.ndarray]:
    array = xr.DataArray(difference, dims=("pair", "layer", "neuron"))
    test = sign_flip_test(array, correction=options.correction, resamples=options.resamples, seed=options.seed)
    return test["p"].values, test["p_corrected"].values


def _permuted(high: np.ndarray, low: np.ndarray, options: TestOptions) -> tuple[np.ndarray, np.ndarray]:
    shape, first, second = high.shape[1:], len(high), len(low)
    p = np.full(int(np.prod(shape)), np.nan)
    corrected = p.copy()
    values = np.concatenate([high, low]).reshape(first + second, -1)
    deviation = values.std(axis=0)
    tested = deviation > 0
    if first < 2 or second < 2 or not tested.any():
        return p.reshape(shape), corrected.reshape(shape)
    # Centred and scaled, so that sums of squares keep their digits in float32; t does not depend on either.
    scaled = ((values - values.mean(axis=0))[:, tested] / deviation[tested]).astype(np.float32)
    observed = np.abs(_welch(_labels(first, second, 0, None), scaled)[0]) - _TIE
    as_large = np.zeros(scaled.shape[1], dtype=np.int64)
    maxima = []
    generator = np.random.default_rng(options.seed)
    step = max(1, _CELLS // scaled.shape[1])
    for start in range(0, options.resamples, step):
        labels = _labels(first, second, min(step, options.resamples - start), generator)
        statistic = np.abs(_welch(labels, scaled))
        as_large += (statistic >= observed).sum(axis=0)
        maxima.append(statistic.max(axis=1))
    alone = (as_large + 1) / (options.resamples + 1)
    p[tested] = alone
    if options.correction == "max-t":
        largest = np.sort(np.concatenate(maxima))
        beyond = options.resamples - np.searchsorted(largest, observed, side="left")
        corrected[tested] = (beyond + 1) / (options.resamples + 1)
    else:
        corrected[tested] = alone
    return p.reshape(shape), corrected.reshape(shape)


def _labels(first: int, second: int, count: int, generator: np.random.Generator | None) -> np.ndarray:
    """Which prompts are in the first set, as 0 and 1 with dims (permutation, prompt); unpermuted without a generator."""
    own = np.concatenate([np.ones(first, np.float32), np.zeros(second, np.float32)])
    if generator is None:
        return own[None]
    return generator.permuted(np.tile(own, (count, 1)), axis=1)


def _welch(labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Welch's t with dims (permutation, site), of values with dims (prompt, site)."""
    first = labels.sum(axis=1)[:, None]
    second = labels.shape[1] - first
    squared = values**2
    mean = labels @ values / first
    other = (values.sum(axis=0) - labels @ values) / second
    spread = (labels @ squared / first - mean**2) / (first - 1)
    spread += ((squared.sum(axis=0) - labels @ squared) / second - other**2) / (second - 1)
    # A permutation that leaves no variance in either set separates perfectly.
    return np.asarray((mean - other) / np.sqrt(np.maximum(spread, 1e-12)))
