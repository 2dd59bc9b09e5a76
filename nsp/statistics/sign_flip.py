"""Sign-flip permutation tests of every site at once, corrected for the number of sites.

Without an effect, a pair's value at a site is as likely to be positive as negative. The test flips the signs of whole
pairs, all sites together, and asks how often a site's statistic is as large as the one observed. The statistic is
sum(x) / sqrt(sum(x^2)), which orders flips as Student's t does and has variance 1 under the flips at every site, so
that ``max-t`` is as strict with a site of small effects as with one of large effects.

Corrections: ``max-t`` compares a site with the largest statistic of all sites in each flip and so bounds the chance of
one false site or more (family-wise); ``bh`` and ``by`` bound the expected share of false sites among the significant
ones (Benjamini-Hochberg for sites that are independent or positively dependent, Benjamini-Yekutieli for any); ``none``
bounds nothing but each test.

Where 2^(n-1) is at most the number of resamples, all flips are made and p is exact; else flips are drawn with a seed
and p is (1 + as large) / (1 + drawn), which is never 0 and never too small on average (Phipson and Smyth 2010).
Values that differ by rounding only count as tied. Winkler et al. 2014; Westfall and Young 1993.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal, TypeAlias, get_args

import numpy as np
import xarray as xr
from scipy import stats

from nsp.errors import InputError
from nsp.statistics.site_table import SiteTable, site_tables

Correction: TypeAlias = Literal["max-t", "bh", "by", "none"]
CORRECTIONS: tuple[str, ...] = get_args(Correction)
# Cells of (flip, site) that are held at once: 32 MiB of float32.
_CELLS, _FLIPS = 2**23, 2048
# Rounding of a float32 sum of n terms, a unit being the statistic's standard deviation.
_TIE = 4e-6


@dataclass(frozen=True)
class _Flips:
    """What the flips gave: p of dim (site), alone and against the largest site."""

    alone: np.ndarray
    largest: np.ndarray
    exact: bool
    count: int

    @property
    def smallest(self) -> float:
        """The smallest p that there can be."""
        return 1 / self.count if self.exact else 1 / (self.count + 1)


def sign_flip_test(
    effect: xr.DataArray,
    *,
    correction: Correction = "max-t",
    level: float = 0.05,
    resamples: int = 9999,
    seed: int = 0,
) -> xr.Dataset:
    """Test each site's effect against zero, two-sided: (pair, ...) -> (...).

    Args:
        effect: one effect per pair and site. NaN cells are missing. Sites that are exactly zero in every pair, or have
            fewer than two pairs, are not in the family.
        correction: ``max-t``, ``bh``, ``by`` or ``none``.
        level: a site is significant where its corrected p is at most this.
        resamples: flips drawn; all of them are made instead where there are no more.

    Returns:
        ``p``, ``p_corrected`` (NaN where not tested), ``significant``, ``tested`` and ``n``, the pairs that a site has.
        Attributes say the family's size, the flips, the smallest p possible, and, in ``note``, where no site could have
        been significant: with one pair there are effects and no significance, with two to five no p reaches 0.05.
    """
    options = {"correction": correction, "level": level, "resamples": resamples, "seed": seed}
    return sign_flip_tests({"": effect}, **options)[""]  # type: ignore[arg-type]


def sign_flip_tests(
    effects: Mapping[str, xr.DataArray],
    *,
    correction: Correction = "max-t",
    level: float = 0.05,
    resamples: int = 9999,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """`sign_flip_test` of several arrays over the same pairs (one per component, say) as one family of sites."""
    _check(correction, level, resamples)
    tables = site_tables(effects)
    tested = {name: (table.pairs > 1) & ~table.zero for name, table in tables.items()}
    values = np.concatenate([table.values[:, tested[name]] for name, table in tables.items()], axis=1)
    pairs, family = values.shape
    flips = _flip(_unit(values), resamples, seed)
    corrected = _corrected(flips, correction)
    attrs = {
        "correction": correction,
        "level": level,
        "family": family,
        "flips": flips.count * 2 if flips.exact else flips.count,
        "exact": int(flips.exact),
        "seed": seed,
        "smallest_p": flips.smallest,
        "note": _note(flips, correction, level, pairs, family),
    }
    tests, start = {}, 0
    for name, table in tables.items():
        part = slice(start, start + int(tested[name].sum()))
        start = part.stop
        tests[name] = _labelled(table, tested[name], flips.alone[part], corrected[part], attrs)
    return tests


def _check(correction: str, level: float, resamples: int) -> None:
    if correction not in CORRECTIONS:
        raise InputError(f"correction is {correction!r}; take one of {', '.join(CORRECTIONS)}")
    if not 0 < level < 1:
        raise InputError(f"level is {level!r}; give a number between 0 and 1, such as 0.05")
    if resamples < 1:
        raise InputError(f"resamples is {resamples!r}; give 1 or more, such as 9999")


def _unit(values: np.ndarray) -> np.ndarray:
    """Values of dims (pair, site) divided by the root of the site's sum of squares, float32; missing cells are 0."""
    filled = np.nan_to_num(values, nan=0.0)
    # Scaled by the largest value first: squares of tiny effects would be zero.
    filled = filled / np.abs(filled).max(axis=0, initial=0.0)
    norm = np.sqrt((filled.astype(np.float64) ** 2).sum(axis=0))
    return np.asarray(filled / norm, dtype=np.float32)


def _flip(unit: np.ndarray, resamples: int, seed: int) -> _Flips:
    pairs, family = unit.shape
    exact = pairs <= 63 and 2 ** (pairs - 1) <= resamples
    count = 2 ** (pairs - 1) if exact else resamples
    observed = np.abs(np.ones((1, pairs), np.float32) @ unit)[0] - _TIE * max(1.0, pairs**0.5)
    as_large, maxima = np.zeros(family, np.int64), np.zeros(count, np.float32)
    size, start = max(1, _CELLS // _FLIPS), 0
    for signs in _signs(pairs, count, exact, seed):
        stop = start + len(signs)
        for low in range(0, family, size):
            part = slice(low, low + size)
            statistic = np.abs(signs @ unit[:, part])
            as_large[part] += (statistic >= observed[part]).sum(axis=0)
            np.maximum(maxima[start:stop], statistic.max(axis=1), out=maxima[start:stop])
        start = stop
    beyond = count - np.searchsorted(np.sort(maxima), observed, side="left")
    extra = 0 if exact else 1  # the observed signs are one of all flips, and are added to those drawn
    return _Flips((as_large + extra) / (count + extra), (beyond + extra) / (count + extra), exact, count)


def _signs(pairs: int, count: int, exact: bool, seed: int) -> Iterator[np.ndarray]:
    """Signs of dims (flip, pair), in blocks.

    All of them: the first pair keeps its sign, since a flip of every sign gives the same two-sided statistic.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, count, _FLIPS):
        numbers = np.arange(start, min(start + _FLIPS, count))
        every = (numbers[:, None] >> np.arange(min(pairs, 63))[None, ::-1]) & 1
        bits = every if exact else generator.integers(0, 2, (len(numbers), pairs))
        yield (1 - 2 * bits).astype(np.float32)


def _corrected(flips: _Flips, correction: str) -> np.ndarray:
    if correction == "max-t":
        return flips.largest
    if correction == "none" or not len(flips.alone):
        return flips.alone
    return np.asarray(stats.false_discovery_control(flips.alone, method=correction))


def _note(flips: _Flips, correction: str, level: float, pairs: int, family: int) -> str:
    """Why no site can be significant, or hardly; empty where the test can speak."""
    if pairs == 1:
        return "one pair gives effects and no significance"
    if family == 0:
        return "no site has an effect other than zero in two pairs or more; nothing was tested"
    floor = f"{flips.smallest:.3g}"
    if flips.smallest > level and flips.exact:
        enough = next(n for n in range(2, 64) if 2.0 ** (1 - n) <= level)
        return (
            f"with {pairs} pairs p is never under {floor}: no site can be significant at {level:g}; {enough} pairs can"
        )
    if flips.smallest > level:
        return f"with {flips.count} flips p is never under {floor}; {ceil(1 / level) - 1} can reach {level:g}"
    strict = {"bh": 1.0, "by": float((1 / np.arange(1, family + 1)).sum())}.get(correction, 0.0)
    needed = ceil(flips.smallest * family * strict / level)
    if needed <= 1:
        return ""
    return (
        f"p is never under {floor}, so with {correction} any site is significant only if {needed} of {family} "
        f"reach it; max-t, or more {'pairs' if flips.exact else 'flips'}, can tell fewer"
    )


def _labelled(
    table: SiteTable, tested: np.ndarray, p: np.ndarray, corrected: np.ndarray, attrs: Mapping[str, object]
) -> xr.Dataset:
    def spread(values: np.ndarray) -> np.ndarray:
        full = np.full(tested.shape, np.nan)
        full[tested] = values
        return full

    kind = f"{attrs['flips']} flips of sign, {'all there are' if attrs['exact'] else 'drawn'}"
    name = {"max-t": "max-T", "bh": "Benjamini-Hochberg", "by": "Benjamini-Yekutieli", "none": "not corrected"}
    how = f"{kind}; {name[str(attrs['correction'])]} over {attrs['family']} sites"
    level = float(str(attrs["level"]))
    significant = np.nan_to_num(spread(corrected), nan=2.0) <= level
    variables = {
        "p": (spread(p), "p of a two-sided sign-flip test (NaN: not tested)", kind),
        "p_corrected": (spread(corrected), "p corrected for the number of sites (NaN: not tested)", how),
        "significant": (significant, f"corrected p at most {level:g}", how),
        "tested": (tested, "in the family: an effect other than zero, and two pairs or more", "count"),
        "n": (table.pairs, "pairs that the site has", "count"),
    }
    return xr.Dataset(
        {
            key: table.labelled(values, {"long_name": text, "units": "1", "method": method})
            for key, (values, text, method) in variables.items()
        },
        attrs=dict(attrs),
    )
