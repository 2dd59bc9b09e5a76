"""Random sites of the same kind as the chosen ones: the control for any claim about chosen sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from scipy import stats

from nsp.errors import InputError
from nsp.statistics.site_table import SiteTable, site_table


def random_sites(
    chosen: xr.DataArray,
    eligible: xr.DataArray | None = None,
    *,
    within: Sequence[str] = (),
    seed: int = 0,
) -> xr.DataArray:
    """As many sites as are chosen, drawn at random from the others: (...) -> (...).

    A control is judged like the chosen sites, on other pairs or as a separate family (``effect.where(drawn)``): in
    the very test that chose the others, those left are not significant by construction, and that shows nothing.

    Args:
        chosen: true at the chosen sites.
        eligible: true where a site may be drawn; give the ``tested`` of `sign_flip_test`, so that sites at which
            nothing can happen are no control. By default all.
        within: dims to match: ``["layer"]`` draws as many from each layer as are chosen there.

    Returns:
        True at the drawn sites, none of which is chosen.

    Raises:
        InputError: there are fewer sites to draw from than were chosen.
    """
    taken = _mask(chosen, "chosen")
    allowed = ~taken if eligible is None else _mask(eligible, "eligible").broadcast_like(taken) & ~taken
    drawn = np.zeros(taken.shape, dtype=bool)
    generator = np.random.default_rng(seed)
    for members in _strata(taken, within):
        count = int(taken.values.reshape(-1)[members].sum())
        pool = members[allowed.transpose(*taken.dims).values.reshape(-1)[members]]
        if len(pool) < count:
            raise InputError(
                f"{count} sites are chosen and only {len(pool)} others can be drawn{_where(within)}; "
                "choose fewer, or match fewer dims"
            )
        drawn.reshape(-1)[generator.choice(pool, size=count, replace=False)] = True
    attrs = {"long_name": "random sites, as many as are chosen", "units": "1", "method": f"drawn, seed {seed}"}
    return taken.copy(data=drawn).assign_attrs(attrs)


def matched_null(
    effect: xr.DataArray,
    chosen: xr.DataArray,
    *,
    within: Sequence[str] = (),
    draws: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How strong the chosen sites are among random sets of as many sites: (pair, ...) -> ().

    The strength of a set is the mean over its sites of the absolute mean effect over pairs. Sets are drawn from all
    sites that have an effect, the chosen ones included, so p is that of a permutation test of which sites were chosen.
    It is honest only where ``chosen`` was decided on other pairs than those of ``effect`` (`split_pairs`).

    Returns:
        ``strength`` of the chosen set; ``null_mean``, ``null_low``, ``null_high``: the mean and the middle 95% over
        random sets; ``p``: the share of sets at least as strong, (1 + as strong) / (1 + draws).
    """
    table, taken = _matched(effect, chosen)
    strata = list(_strata(taken, within))
    null = _Null(_strengths(table), _able(table), taken.values.reshape(-1), strata, draws, seed)
    return null.dataset(effect.attrs.get("units", "1"))


def matched_nulls(
    effects: Mapping[str, xr.DataArray],
    chosen: Mapping[str, xr.DataArray],
    *,
    draws: int = 1000,
    controls: int = 20,
    level: float = 0.05,
    seed: int = 0,
) -> xr.Dataset:
    """`matched_null` of several arrays (one per component, say) as one set of sites, with control sets judged like it.

    A random set has as many sites of each array as are chosen there. Each control is a random set of as many sites that
    are *not* chosen, judged as the chosen set is: its p is the share of the random sets that are at least as strong,
    corrected over the controls (Benjamini-Hochberg). Controls that come out significant say that the choice missed
    strong sites; that none does says nothing about single sites among those left, some of which may have an effect.

    Args:
        effects, chosen: effects by name, and true at the chosen sites, over the same pairs.
        draws: random sets; ``controls``: control sets; ``level``: of the controls' corrected p.

    Returns:
        As `matched_null`, and ``size``, the chosen sites; ``controls``, the control sets that could be drawn (none,
        where fewer sites are left than were chosen); ``controls_significant`` of them; ``control_strength``, their
        mean strength (NaN without any).
    """
    if not 0 < level < 1:
        raise InputError(f"level is {level!r}; give a number between 0 and 1, such as 0.05")
    parts = {name: _matched(effect, chosen[name]) for name, effect in effects.items()}
    sizes = [table.values.shape[1] for table, _ in parts.values()]
    flat = np.concatenate([taken.values.reshape(-1) for _, taken in parts.values()])
    strata = np.split(np.arange(len(flat)), np.cumsum(sizes)[:-1])
    strengths = np.concatenate([_strengths(table) for table, _ in parts.values()])
    able = np.concatenate([_able(table) for table, _ in parts.values()])
    null = _Null(strengths, able, flat, strata, draws, seed)
    units = next(iter(effects.values())).attrs.get("units", "1")
    control = null.controls(controls, seed + 1)
    p = np.array([null.share(value) for value in control])
    significant = int((stats.false_discovery_control(p) <= level).sum()) if len(p) else 0
    how = {"units": "1", "method": f"random sets of sites that are not chosen, seed {seed + 1}"}
    mean = float(control.mean()) if len(control) else float("nan")
    added = {
        "size": (int(flat.sum()), {"long_name": "chosen sites", "units": "1", "method": "count"}),
        "controls": (len(control), {"long_name": "control sets", **how}),
        "controls_significant": (significant, {"long_name": f"control sets with a corrected p at most {level:g}", **how}),
        "control_strength": (mean, {"long_name": "mean absolute effect of control sets", **how, "units": units}),
    }
    return null.dataset(units).assign({key: ((), value, attrs) for key, (value, attrs) in added.items()})


class _Null:
    """Strengths of random sets of sites, as many from each stratum as are chosen there."""

    def __init__(
        self, strength: np.ndarray, able: np.ndarray, chosen: np.ndarray, strata: Sequence[np.ndarray], draws: int, seed: int
    ) -> None:
        if draws < 1:
            raise InputError(f"draws is {draws!r}; give 1 or more, such as 1000")
        if not chosen.any():
            raise InputError("no site is chosen, so there is nothing to compare with random sites")
        self.strength, self.able, self.chosen, self.strata, self.seed = strength, able, chosen, strata, seed
        self.size = int(chosen.sum())
        self.observed = float(strength[chosen].sum()) / self.size
        self.values = self._drawn(able | chosen, draws, seed)

    def _drawn(self, eligible: np.ndarray, draws: int, seed: int) -> np.ndarray:
        """Strengths of random sets, dim (draw,); none where a stratum has too few eligible sites."""
        generator, total = np.random.default_rng(seed), np.zeros(draws)
        for members in self.strata:
            count = int(self.chosen[members].sum())
            pool = self.strength[members[eligible[members]]]
            if count > len(pool):
                return np.zeros(0)
            if count:
                total += [generator.choice(pool, size=count, replace=False).sum() for _ in range(draws)]
        return total / self.size

    def share(self, strength: float) -> float:
        """The share of random sets at least as strong, itself among them."""
        return float(1 + (self.values >= strength * (1 - 1e-9)).sum()) / (1 + len(self.values))

    def controls(self, count: int, seed: int) -> np.ndarray:
        """Strengths of random sets of sites that are not chosen, dim (control,)."""
        return self._drawn(self.able & ~self.chosen, count, seed)

    def dataset(self, units: str) -> xr.Dataset:
        draws = f"{len(self.values)} random sets of {self.size} sites, seed {self.seed}"
        unit = {"units": units, "method": draws}
        low, high = np.quantile(self.values, [0.025, 0.975])
        variables = {
            "strength": (self.observed, "mean absolute effect of the chosen sites", unit),
            "null_mean": (self.values.mean(), "mean absolute effect of as many random sites", unit),
            "null_low": (low, "lower end of the middle 95% of random sets", unit),
            "null_high": (high, "upper end of the middle 95% of random sets", unit),
            "p": (self.share(self.observed), "share of random sets at least as strong", {**unit, "units": "1"}),
        }
        return xr.Dataset({key: ((), value, {"long_name": text, **attrs}) for key, (value, text, attrs) in variables.items()})


def _matched(effect: xr.DataArray, chosen: xr.DataArray) -> tuple[SiteTable, xr.DataArray]:
    """The effects as a table, and the chosen sites in its order."""
    table, taken = site_table(effect), _mask(chosen, "chosen")
    if set(taken.dims) != set(table.blank.dims) or any(
        taken.sizes[dim] != size for dim, size in table.blank.sizes.items()
    ):
        raise InputError(f"chosen has sizes {dict(taken.sizes)}, the effects' sites {dict(table.blank.sizes)}")
    return table, taken.transpose(*table.blank.dims)


def _strengths(table: SiteTable) -> np.ndarray:
    """The absolute mean effect of each site, dim (site,); 0 without a pair."""
    return np.asarray(np.abs(np.nansum(table.values, axis=0, dtype=np.float64)) / np.maximum(table.pairs, 1))


def _able(table: SiteTable) -> np.ndarray:
    """Sites at which something can happen, dim (site,)."""
    return np.asarray((table.pairs > 0) & ~table.zero)


def _mask(sites: xr.DataArray, what: str) -> xr.DataArray:
    if not isinstance(sites, xr.DataArray) or sites.dtype != bool:
        raise InputError(f"{what} must be an xarray.DataArray of true and false, such as the `significant` of a test")
    return sites


def _strata(taken: xr.DataArray, within: Sequence[str]) -> Iterator[np.ndarray]:
    """Numbers of the sites (flat) that share their place along the dims in ``within``."""
    unknown = [dim for dim in within if dim not in taken.dims]
    if unknown:
        raise InputError(f"within: the sites have no dim {unknown[0]!r}; they have {', '.join(map(str, taken.dims))}")
    numbers = np.arange(taken.size).reshape(taken.shape)
    axes = [taken.dims.index(dim) for dim in within]
    front = np.moveaxis(numbers, axes, range(len(axes)))
    yield from front.reshape(int(np.prod([taken.shape[axis] for axis in axes], dtype=int)), -1)


def _where(within: Sequence[str]) -> str:
    return f" in one place along {', '.join(within)}" if within else ""
