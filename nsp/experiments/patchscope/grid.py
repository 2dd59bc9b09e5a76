"""Which (source layer, target layer) cells run: all, lists, or a preset that scales with the models' depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from nsp.experiments.patchscope.recipe import PatchscopeRecipe
from nsp.sites import Selection

_QUICK = 6
_COARSE = 6
_HOTSPOTS = 3

Cell = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """The layers of a run.

    Attributes:
        layers, target_layers: layer numbers on the source and on the target model.
        coarse: the step of the coarse grid that is run first and refined, or 0 where every cell runs.
    """

    layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    coarse: int = 0

    def coarse_cells(self) -> list[Cell]:
        """The cells of the coarse grid, by number of layer."""
        return [
            (layer, target)
            for layer in range(0, len(self.layers), self.coarse)
            for target in range(0, len(self.target_layers), self.coarse)
        ]

    def cells(self) -> int:
        """Cells that run, at most."""
        if not self.coarse:
            return len(self.layers) * len(self.target_layers)
        return len(self.coarse_cells()) + _HOTSPOTS * (2 * _reach(self) + 1) ** 2


def grid_of(recipe: PatchscopeRecipe, n_source: int, n_target: int) -> Grid:
    """The grid of a recipe on models with so many layers."""
    if recipe.preset == "quick":
        return Grid(spaced(n_source, _QUICK), spaced(n_target, _QUICK))
    if recipe.preset == "targeted":
        # Patchscopes read best into early target layers, which leave most of the model to make sense of the vector.
        return Grid(tuple(range(0, n_source, 2)), tuple(range(ceil(n_target / 3))))
    if recipe.preset == "comprehensive":
        return Grid(
            tuple(range(n_source)), tuple(range(n_target)), coarse=max(2, ceil(max(n_source, n_target) / _COARSE))
        )
    layers = Selection.of(recipe.layers).resolve(n_source, what="source layer (layers)")
    target = Selection.of(recipe.target_layers).resolve(n_target, what="target layer (target_layers)")
    return Grid(tuple(sorted(layers)), tuple(sorted(target)))


def spaced(layers: int, count: int) -> tuple[int, ...]:
    """At most ``count`` layers, evenly spaced from the first to the last."""
    return tuple(dict.fromkeys(int(layer) for layer in np.linspace(0, layers - 1, min(count, layers)).round()))


def hotspot_cells(cells: Sequence[Cell], match: np.ndarray, score: np.ndarray) -> list[Cell]:
    """The best cells, by match class and then by score; both arrays have axes (layer, target layer)."""

    def key(cell: Cell) -> tuple[float, float]:
        value = float(score[cell])
        return float(match[cell]), -np.inf if np.isnan(value) else value

    return sorted(cells, key=key, reverse=True)[:_HOTSPOTS]


def neighbours(cells: Sequence[Cell], grid: Grid) -> list[Cell]:
    """The cells halfway to the next ones of the coarse grid, and the given ones, in order."""
    reach = _reach(grid)
    around = {
        (layer, target)
        for row, column in cells
        for layer in range(row - reach, row + reach + 1)
        for target in range(column - reach, column + reach + 1)
    }
    return sorted(cell for cell in around if 0 <= cell[0] < len(grid.layers) and 0 <= cell[1] < len(grid.target_layers))


def _reach(grid: Grid) -> int:
    return max(1, grid.coarse // 2)
