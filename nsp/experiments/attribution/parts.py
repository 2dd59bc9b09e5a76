"""One attributed component of a run: its site, its place in the store, its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nsp.engine.lowering import Resolved, resolve
from nsp.experiments.attribution.items import Item
from nsp.experiments.attribution.recipe import AttributionRecipe
from nsp.model import Model
from nsp.sites import Site, component
from nsp.trace import default_axes


class Attributed:
    """One attributed component: its site, its place in the store, its axes."""

    def __init__(self, model: Model, recipe: AttributionRecipe, name: str, items: Sequence[Item]) -> None:
        found = component(name)
        self.name = name
        self.site = Site.of(name, recipe.layers if found.layered else None, positions=recipe.positions)
        self.has_units = found.unit is not None and not found.is_module
        self.each = self.site.with_(units="*") if self.has_units else self.site
        self.axes = default_axes(self.each)
        self.resolved: Resolved = resolve(model.runtime, self.each, [item.prompt for item in items])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layer, position, unit) of the longest prompt."""
        item = self.resolved
        return len(item.layers), max(map(len, item.positions)), len(item.unit_rows)

    @property
    def dims(self) -> tuple[str, ...]:
        names = {"layer": "layer", "position": "position", "unit": self.site.spec.dim}
        return ("prompt", *(names[axis] for axis in ("layer", "position", "unit") if axis in self.axes))

    def fitted(self, values: np.ndarray, blank: float, dtype: Any) -> np.ndarray:
        """One prompt's values (layer, position, unit) as the store holds them, with a leading prompt axis."""
        full = np.full(self.shape, blank, dtype=dtype)
        full[tuple(slice(0, extent) for extent in values.shape)] = values
        kept = tuple(slice(None) if axis in self.axes else 0 for axis in ("layer", "position", "unit"))
        return np.asarray(full[kept])[None]
