"""Results that are NaN or infinite are reported where they are computed, never compared away."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np


def warn_nonfinite(metric: str, values: np.ndarray, there: np.ndarray, name: Callable[[tuple[int, ...]], str]) -> None:
    """Warn of values that are NaN or infinite among the cells that are ``there``; ``name`` tells people a cell."""
    bad = np.argwhere(~np.isfinite(values) & there)
    if len(bad) == 0:
        return
    named = "; ".join(name(tuple(map(int, cell))) for cell in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    message = f"{metric}: {len(bad)} of {int(there.sum())} values are NaN or infinite: {named}{more}. They are kept as they are"
    warnings.warn(message, RuntimeWarning, stacklevel=3)
