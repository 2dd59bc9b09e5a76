"""Regions of an array in words: dims with the labels that their coordinates give."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr


def describe_region(dataset: xr.Dataset, region: Mapping[str, slice]) -> str:
    """`pair=0, layer=4..7`: first and last label of each dim of `region`."""
    parts: list[str] = []
    for dim, span in region.items():
        start, stop, _ = span.indices(dataset.sizes[dim])
        first, last = _label(dataset, dim, start), _label(dataset, dim, stop - 1)
        parts.append(f"{dim}={first}" if stop - start <= 1 else f"{dim}={first}..{last}")
    return ", ".join(parts) or "all coordinates"


def _label(dataset: xr.Dataset, dim: str, place: int) -> str:
    if dim in dataset.coords:
        return str(dataset[dim].values[place])
    return str(place)
