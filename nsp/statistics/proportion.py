"""The interval of a proportion."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats


def wilson_interval(
    share: npt.ArrayLike, count: npt.ArrayLike, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the Wilson score interval of a share of ``count`` trials; NaN where there are none (Wilson 1927).

    Shares may be means of shares, as of templates within sources, so that ``share * count`` is no whole number.
    """
    rate, n = np.asarray(share, dtype=np.float64), np.asarray(count, dtype=np.float64)
    z = stats.norm.ppf(0.5 + confidence / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low, high = np.where(rate > 0, centre - half, 0.0), np.where(rate < 1, centre + half, 1.0)
    return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)
