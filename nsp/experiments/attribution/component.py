"""One attributed component of a run: its sites, the units that are scored one by one, and their place in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsp.datasets.prompts import Prompt
from nsp.engine.lowering import Resolved, resolve
from nsp.experiments.attribution.recipe import AttributionRecipe
from nsp.model import Model
from nsp.results import axis_coords
from nsp.sites import Site, component
from nsp.trace import default_axes


@dataclass(frozen=True, eq=False)
class AttributedComponent:
    """One attributed component.

    Attributes:
        site: its layers and positions, all units together; ``each`` the same, unit by unit where it has units.
        resolved: ``each`` on the run's prompts; ``axes`` those of layer, position and unit that it has.
    """

    name: str
    site: Site
    each: Site
    resolved: Resolved
    axes: tuple[str, ...]

    @property
    def has_units(self) -> bool:
        """Whether it has heads or neurons, so that a circuit can be made of it."""
        return self.each.units is not None

    @property
    def dims(self) -> tuple[str, ...]:
        """The dims of its results."""
        names = {"layer": "layer", "position": "position", "unit": self.site.spec.dim}
        return ("prompt", *(names[axis] for axis in ("layer", "position", "unit") if axis in self.axes))

    @property
    def units(self) -> int:
        """How many units one prompt has, over layers and positions (of the longest one)."""
        item = self.resolved
        return len(item.layers) * max(map(len, item.positions)) * len(item.unit_rows)

    def coords(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The coordinates of its dims, but ``prompt``."""
        return axis_coords(self.resolved, self.axes, prompts, "prompt", self.site.spec.dim)

    def labelled(self, values: np.ndarray) -> np.ndarray:
        """One prompt's values (layer, position, unit) with the axes of `dims`, one prompt long."""
        kept = tuple(slice(None) if axis in self.axes else 0 for axis in ("layer", "position", "unit"))
        return np.asarray(values[kept])[None]


def attributed_component(
    model: Model, recipe: AttributionRecipe, name: str, prompts: Sequence[Prompt]
) -> AttributedComponent:
    """A component of a recipe on a model; InputError where the model has none, or not at these layers or positions."""
    spec = component(name)
    site = Site.of(name, recipe.layers if spec.layered else None, positions=recipe.positions)
    each = site.with_(units="*") if spec.unit is not None and not spec.is_module else site
    return AttributedComponent(name, site, each, resolve(model.runtime, each, prompts), default_axes(each))
