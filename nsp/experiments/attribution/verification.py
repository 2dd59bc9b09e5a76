"""Proof by exact patching: how well scores agree with exact effects, and how well circuits do what they claim.

- agreement: Spearman's rank correlation of score and exact effect; recall, the share of the units with the largest exact effects that
  are among as many units with the largest scores; miss rate, one minus that share.
- faithfulness of a set of units: (m(set) - m(none)) / (m(all) - m(none)), where m(set) ablates every unit outside the set.
- completeness: the faithfulness of everything *but* the circuit: 0 where the circuit is complete (Marks et al. 2024).
- minimality: the faithfulness that the circuit's weakest tenth carries: near 0 where the circuit is larger than it needs to be.
- CPR and CMD: the area under the faithfulness curve and the area between it and 1, over the proportion of units kept, by the
  trapezoid rule over the evaluated sizes (MIB, Mueller et al. 2025): CPR high, CMD 0 is best. Measured values are averaged over prompts
  before they are normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from nsp.experiments.attribution.selection import Mask, ranking

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
MEASURES = ("faithfulness", "completeness", "minimality")


def spearman(left: Floats, right: Floats) -> float:
    """Spearman's rank correlation over entries that both have; NaN where one of them does not vary."""
    both = ~(np.isnan(left) | np.isnan(right))
    if both.sum() < 2:
        return float("nan")
    a, b = rankdata(left[both]), rankdata(right[both])
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def recall(scores: Floats, exact: Floats, top: int) -> float:
    """Share of the ``top`` units with the largest absolute exact effects that are among the ``top`` with the largest absolute scores.

    NaN where not every unit has an exact effect: the largest are not known then.
    """
    flat, true = np.abs(scores).reshape(-1), np.abs(exact).reshape(-1)
    if np.isnan(true[~np.isnan(flat)]).any():
        return float("nan")
    count = min(top, int((~np.isnan(flat)).sum()))
    scored = set(ranking(np.nan_to_num(flat))[:count].tolist())
    wanted = set(ranking(np.nan_to_num(true))[:count].tolist())
    return len(scored & wanted) / count if count else float("nan")


def sizes_of(proportions: Sequence[float], universe: int) -> Ints:
    """Numbers of units at proportions of all, rounded down, at least one, as in MIB."""
    return np.array([max(1, int(part * universe + 1e-9)) for part in proportions], dtype=np.int64)


def curve_masks(order: Ints, sizes: Ints, shape: tuple[int, ...]) -> dict[str, Mask]:
    """Which units are *kept* at each size, (size, layer, position, unit): the circuit, its complement, the circuit without its weakest tenth."""
    universe = len(order)
    place = np.empty(universe, dtype=np.int64)
    place[order] = np.arange(universe)
    inside = place[None, :] < sizes[:, None]
    weakest = np.maximum(1, sizes // 10)
    core = place[None, :] < (sizes - weakest)[:, None]
    full = (len(sizes), *shape)
    return {
        "faithfulness": inside.reshape(full),
        "completeness": ~inside.reshape(full),
        "minimality": core.reshape(full),
    }


def random_like(mask: Mask, draws: int, seed: int, eligible: Mask | None = None) -> Mask:
    """Random circuits with as many units in each layer as ``mask`` has, (draw, layer, position, unit)."""
    generator = np.random.default_rng(seed)
    drawn = np.zeros((draws, *mask.shape), dtype=bool)
    for layer in range(len(mask)):
        count = int(mask[layer].sum())
        allowed = np.arange(mask[layer].size) if eligible is None else np.flatnonzero(eligible[layer])
        for draw in range(draws):
            drawn[draw, layer].reshape(-1)[generator.choice(allowed, count, replace=False)] = True
    return drawn


def normalised(values: Floats, empty: float, whole: float) -> Floats:
    """Faithfulness of measured values; NaN where ablating everything changes nothing."""
    scale = whole - empty
    return np.asarray((values - empty) / (scale if abs(scale) > 1e-6 else np.nan))


def areas(proportions: Sequence[float], faithfulness: Floats) -> tuple[float, float]:
    """(CPR, CMD) of one curve."""
    x, f = np.asarray(proportions, dtype=np.float64), np.asarray(faithfulness, dtype=np.float64)
    steps = np.diff(x)
    return (
        float((steps * (f[1:] + f[:-1]) / 2).sum()),
        float((steps * (np.abs(1 - f[1:]) + np.abs(1 - f[:-1])) / 2).sum()),
    )


def size_reaching(sizes: Ints, faithfulness: Floats, level: float = 0.8, *, stays: bool = False) -> int | None:
    """The smallest evaluated size whose faithfulness is at least ``level`` (``stays``: and every larger one's too), or None."""
    enough = np.asarray(faithfulness) >= level
    if stays:
        enough = np.logical_and.accumulate(enough[::-1])[::-1]
    reached = np.flatnonzero(enough)
    return int(sizes[reached[0]]) if len(reached) else None
