"""Split halves: sites are selected on one part of the pairs and their effects estimated on the other.

The strongest of many sites look stronger than they are on the very pairs that made them the strongest. On other pairs
they do not.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.statistics.intervals import mean_effects
from nsp.statistics.sign_flip import Correction, sign_flip_test
from nsp.statistics.site_table import PAIR, check_effects


def split_pairs(effect: xr.DataArray, *, fraction: float = 0.5, seed: int = 0) -> tuple[xr.DataArray, xr.DataArray]:
    """The pairs in two parts drawn at random: (pair, ...) -> (pair, ...), (pair, ...), to select on and to estimate on.

    Pairs keep their order and labels. Pairs that belong together go through `average_pairs` first.

    Args:
        fraction: the share of pairs to select on, rounded to whole pairs; each part has one pair at least.
    """
    count = check_effects(effect).sizes[PAIR]
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction!r}; give a number between 0 and 1, such as 0.5")
    if count < 2:
        raise InputError("one pair cannot be split; give two pairs or more")
    size = min(max(round(fraction * count), 1), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    return effect.isel({PAIR: np.sort(order[:size])}), effect.isel({PAIR: np.sort(order[size:])})


def split_half(
    effect: xr.DataArray,
    *,
    fraction: float = 0.5,
    correction: Correction = "max-t",
    level: float = 0.05,
    resamples: int = 9999,
    confidence: float = 0.95,
    interval: Literal["percentile", "bca"] = "percentile",
    seed: int = 0,
) -> xr.Dataset:
    """Select sites on one part of the pairs, estimate and test them on the other: (pair, ...) -> (...).

    Args:
        fraction: the share of pairs to select on.
        correction, level, resamples: of the selection, and of the test on the other part, whose family is the selected
            sites alone.
        confidence, interval: of the intervals.

    Returns:
        ``selected``: significant on the first part. ``mean``, ``low``, ``high``, ``n``, ``p``, ``p_corrected``: from
        the second part, NaN where not selected. ``significant``: selected, and significant on the second part too.
    """
    first, second = split_pairs(effect, fraction=fraction, seed=seed)
    selection = sign_flip_test(first, correction=correction, level=level, resamples=resamples, seed=seed)
    selected = selection["significant"].rename("selected")
    kept = second.where(selected)
    estimate = mean_effects(kept, confidence=confidence, seed=seed, method=interval)
    test = sign_flip_test(kept, correction=correction, level=level, resamples=resamples, seed=seed)
    sizes = {"select_pairs": first.sizes[PAIR], "estimate_pairs": second.sizes[PAIR]}
    how = f"{selection['significant'].attrs['method']}; on {sizes['select_pairs']} of {effect.sizes[PAIR]} pairs"
    selected.attrs |= {"long_name": "significant on the first part of the pairs", "method": how}
    notes = {
        "selection_note": selection.attrs["note"],
        "note": test.attrs["note"] if bool(selected.any()) else "no site was selected",
    }
    both = estimate.assign({key: test[key] for key in ("p", "p_corrected", "significant")} | {"selected": selected})
    return both.assign_attrs({**estimate.attrs, **test.attrs, **sizes, **notes})
