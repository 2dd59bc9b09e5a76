"""Effects as a matrix of dims (pair, site): what all the statistics work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsp.errors import InputError

PAIR = "pair"


@dataclass(frozen=True)
class SiteTable:
    """Effects of dims (pair, site), with what is needed to label values of dim (site) again.

    Attributes:
        values: effects, floating, dims (pair, site); NaN is missing. Rows are in an order that depends
            on the values alone, so that no result depends on the order in which pairs were listed.
        blank: an array of the sites' dims and coordinates.
    """

    values: np.ndarray
    blank: xr.DataArray

    @property
    def pairs(self) -> np.ndarray:
        """How many pairs each site has, dim (site)."""
        return np.asarray((~np.isnan(self.values)).sum(axis=0))

    @property
    def zero(self) -> np.ndarray:
        """Sites that have pairs and whose effect is exactly zero in all of them, dim (site)."""
        return np.asarray((self.pairs > 0) & (np.isnan(self.values) | (self.values == 0)).all(axis=0))

    def labelled(self, values: np.ndarray, attrs: Mapping[str, Any]) -> xr.DataArray:
        """Values of dim (site) with the sites' dims and coordinates."""
        return self.blank.copy(data=values.reshape(self.blank.shape)).assign_attrs(attrs)


def site_table(effect: xr.DataArray) -> SiteTable:
    """The matrix of one array of effects; InputError where it has no pair dim, no pair, or infinite values."""
    return site_tables({"": effect})[""]


def site_tables(effects: Mapping[str, xr.DataArray]) -> dict[str, SiteTable]:
    """The matrices of several arrays over the same pairs, with one order of rows for all."""
    matrices, blanks = {}, {}
    for name, effect in effects.items():
        moved = check_effects(effect, name).transpose(PAIR, ...)
        blanks[name] = _without_pair(moved)
        dtype = np.float32 if moved.dtype in (np.float16, np.float32) else np.float64
        matrix: np.ndarray = np.array(moved.values, dtype=dtype).reshape(moved.sizes[PAIR], -1)
        np.add(matrix, 0, out=matrix)  # turns -0.0 into 0.0, so that equal rows have equal bytes
        matrices[name] = matrix
    if len({len(matrix) for matrix in matrices.values()}) != 1:
        sizes = ", ".join(f"{name} {len(matrix)}" for name, matrix in matrices.items())
        raise InputError(f"one family of sites has the same pairs throughout, not {sizes or 'none'}")
    order = _order(list(matrices.values()))
    return {name: SiteTable(matrix[order], blanks[name]) for name, matrix in matrices.items()}


def average_pairs(effect: xr.DataArray, labels: xr.DataArray | Sequence[Any]) -> xr.DataArray:
    """Effects averaged over the pairs that share a label: (pair, ...) -> (pair, ...), one pair per label.

    For pairs that are no independent sample: both directions of an interchange, or variants of one prompt, are one
    observation. NaN cells are left out of the average.

    Args:
        labels: one label per pair, such as the ``pair_name`` of a run's inputs.
    """
    check_effects(effect)
    given = np.asarray(labels)
    if given.shape != (effect.sizes[PAIR],):
        raise InputError(f"labels have shape {given.shape}; give one label for each of {effect.sizes[PAIR]} pairs")
    _, first, inverse = np.unique(given, return_index=True, return_inverse=True)
    groups = np.argsort(np.argsort(first))[inverse]  # in the order in which the labels first appear
    drop = [name for name, coord in effect.coords.items() if PAIR in coord.dims]
    marked = effect.drop_vars(drop).assign_coords({PAIR: groups})
    averaged: xr.DataArray = marked.groupby(PAIR).mean(skipna=True).transpose(*effect.dims)
    return averaged.assign_attrs(effect.attrs)


def check_effects(effect: xr.DataArray, name: str = "") -> xr.DataArray:
    """The effects; InputError where they are no array of numbers with a pair dim, have no pair, or are infinite."""
    which = f" of {name}" if name else ""
    if not isinstance(effect, xr.DataArray):
        raise InputError(f"effects{which} are a {type(effect).__name__}; give one variable, an xarray.DataArray")
    if PAIR not in effect.dims:
        have = ", ".join(map(str, effect.dims)) or "none"
        raise InputError(f"effects{which} have no dim 'pair', over which statistics are made; their dims: {have}")
    if effect.sizes[PAIR] == 0:
        raise InputError(f"effects{which} have no pair")
    if effect.dtype.kind not in "fiu":
        raise InputError(f"effects{which} are of type {effect.dtype}, not numbers")
    infinite = np.isinf(effect.values)
    if infinite.any():
        where = dict(zip(effect.dims, map(int, np.argwhere(infinite)[0]), strict=True))
        raise InputError(f"effects{which} are infinite in {int(infinite.sum())} cells, the first at {where}")
    return effect


def _without_pair(effect: xr.DataArray) -> xr.DataArray:
    drop = [name for name, coord in effect.coords.items() if PAIR in coord.dims]
    blank = effect.drop_vars(drop).isel({PAIR: 0})
    blank.attrs = {}
    return blank


def _order(matrices: Sequence[np.ndarray]) -> list[int]:
    return sorted(range(len(matrices[0])), key=lambda row: [matrix[row].tobytes() for matrix in matrices])
