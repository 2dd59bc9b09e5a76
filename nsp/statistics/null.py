"""Random sites of the same kind as the chosen ones: the control for any claim about chosen sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.statistics.table import site_table


def random_sites(
    chosen: xr.DataArray,
    eligible: xr.DataArray | None = None,
    *,
    within: Sequence[str] = (),
    seed: int = 0,
) -> xr.DataArray:
    """As many sites as are chosen, drawn at random from the others: (...) -> (...).

    A control is judged like the chosen sites, on other pairs or as a family of its own (``effect.where(drawn)``): in
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
    if draws < 1:
        raise InputError(f"draws is {draws!r}; give 1 or more, such as 1000")
    table = site_table(effect)
    taken = _mask(chosen, "chosen")
    if set(taken.dims) != set(table.blank.dims) or any(
        taken.sizes[dim] != size for dim, size in table.blank.sizes.items()
    ):
        raise InputError(f"chosen has sizes {dict(taken.sizes)}, the effects' sites {dict(table.blank.sizes)}")
    taken = taken.transpose(*table.blank.dims)
    flat = taken.values.reshape(-1)
    able = (table.pairs > 0) & ~table.zero
    if not flat.any():
        raise InputError("no site is chosen, so there is nothing to compare with random sites")
    sums = np.nansum(table.values, axis=0, dtype=np.float64)
    strength = np.abs(sums) / np.maximum(table.pairs, 1)
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    size = int(flat.sum())
    for members in _strata(taken, within):
        count = int(flat[members].sum())
        pool = strength[members[able[members] | flat[members]]]
        if count:
            total += [generator.choice(pool, size=count, replace=False).sum() for _ in range(draws)]
    observed, null = float(strength[flat].sum()) / size, total / size
    as_strong = int((null >= observed * (1 - 1e-9)).sum())
    unit = {"units": effect.attrs.get("units", "1"), "method": f"{draws} random sets of {size} sites, seed {seed}"}
    low, high = np.quantile(null, [0.025, 0.975])
    made = {
        "strength": (observed, "mean absolute effect of the chosen sites", unit),
        "null_mean": (null.mean(), "mean absolute effect of as many random sites", unit),
        "null_low": (low, "lower end of the middle 95% of random sets", unit),
        "null_high": (high, "upper end of the middle 95% of random sets", unit),
        "p": ((1 + as_strong) / (1 + draws), "share of random sets at least as strong", {**unit, "units": "1"}),
    }
    return xr.Dataset({key: ((), value, {"long_name": text, **attrs}) for key, (value, text, attrs) in made.items()})


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
