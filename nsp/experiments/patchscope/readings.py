"""What a patchscope puts in: representations as read from the sources, mapped between models, and their controls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from nsp.engine.recording import record
from nsp.engine.slots import BOUNDARY
from nsp.experiments.patchscope.grid import Grid
from nsp.experiments.patchscope.map import LayerMap, fit_map
from nsp.experiments.patchscope.recipe import PatchscopeRecipe
from nsp.experiments.patchscope.sources import Row, Source, Target
from nsp.experiments.prompt_options import encode_prompts
from nsp.model import Model


class Readings:
    """The vectors of a run; everything is computed when it is first needed, and the same whatever ran before."""

    def __init__(
        self, model: Model, source_model: Model, recipe: PatchscopeRecipe, grid: Grid,
        sources: Sequence[Source], targets: Sequence[Target], rows: Sequence[Row],
    ) -> None:  # fmt: skip
        self.model, self.source_model, self.recipe, self.grid = model, source_model, recipe, grid
        self.sources, self.targets, self.rows = sources, targets, rows
        self._kept: dict[int, torch.Tensor] = {}

    def vectors(self, variant: str, places: np.ndarray) -> torch.Tensor:
        """The vector of each cell, float32 on the CPU with axes (cell, width).

        ``places`` has axes (cell, 3): row, source layer and target layer by number. ``variant`` is ``patch``, ``random``
        (a direction drawn for the source and its layer, of the same norm) or ``unrelated``.
        """
        found = []
        for row, layer, target in places:
            owner = self.rows[row]
            vector = self._read(owner.unrelated if variant == "unrelated" else owner.source)[layer, target]
            if variant == "random":
                generator = np.random.default_rng([self.recipe.seed, owner.source, self.grid.layers[layer]])
                drawn = torch.from_numpy(generator.standard_normal(len(vector))).float()
                vector = drawn / drawn.norm() * vector.norm()
            found.append(vector)
        return torch.stack(found)

    def _read(self, source: int) -> torch.Tensor:
        """What one source holds, as it is put in: (source layer, target layer, width)."""
        if source not in self._kept:
            one, layers = self.sources[source], self.grid.layers
            # Each source runs on its own, so that what it holds does not depend on the others.
            slots = {(BOUNDARY, layer + 1) for layer in layers}
            taken = record(self.source_model.runtime, [one.prompt.token_ids], slots)
            vectors = [taken.values[(BOUNDARY, layer + 1)][0, one.position].float().cpu() for layer in layers]
            if self.layer_map is None:
                self._kept[source] = torch.stack(vectors)[:, None].expand(-1, len(self.grid.target_layers), -1)
            else:
                mapped = [self.layer_map.mapped(vector[None], layer)[0] for layer, vector in enumerate(vectors)]
                self._kept[source] = torch.stack(mapped)
        return self._kept[source]

    @cached_property
    def placeholders(self) -> list[torch.Tensor]:
        """What each target prompt itself holds at its placeholder: (target layer, width) a target."""
        found, layers = [], self.grid.target_layers
        for target in self.targets:
            slots = {(BOUNDARY, layer + 1) for layer in layers}
            taken = record(self.model.runtime, [target.prompt.token_ids], slots)
            held = [taken.values[(BOUNDARY, layer + 1)][0, target.position].float().cpu() for layer in layers]
            found.append(torch.stack(held))
        return found

    @cached_property
    def layer_map(self) -> LayerMap | None:
        """The map between the models, where the recipe asks for one."""
        options = self.recipe.map
        if options is None:
            return None
        runtimes = self.source_model.runtime, self.model.runtime
        layers = self.grid.layers, self.grid.target_layers
        return fit_map(*runtimes, self.map_ids(self.source_model), self.map_ids(self.model), *layers, options.ridge)

    def map_ids(self, model: Model) -> list[tuple[int, ...]]:
        """The map's texts as one of the models reads them."""
        assert self.recipe.map is not None
        return [prompt.token_ids for prompt in encode_prompts(model, self.recipe.map.prompts)]
