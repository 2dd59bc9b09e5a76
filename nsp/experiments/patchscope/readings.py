"""What a patchscope puts in: representations as read from the sources, mapped between models, and their controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.experiments.patchscope.grid import Grid
from nsp.experiments.patchscope.map import LayerMap, fit_map
from nsp.experiments.patchscope.recipe import PatchscopeRecipe
from nsp.experiments.patchscope.sources import Row, Source, Target
from nsp.experiments.prompt_options import encode_prompts
from nsp.model import Model


@dataclass(eq=False)
class Readings:
    """The vectors of a run; everything is computed when it is first needed, and the same whatever ran before."""

    model: Model
    source_model: Model
    recipe: PatchscopeRecipe
    grid: Grid
    sources: Sequence[Source]
    targets: Sequence[Target]
    rows: Sequence[Row]
    _kept: dict[int, torch.Tensor] = field(default_factory=dict, init=False)

    def vectors(self, variant: str, places: np.ndarray) -> torch.Tensor:
        """The vector of each cell, float32 on the CPU with axes (cell, width).

        ``places`` has axes (cell, 3): row, source layer and target layer by number. ``variant`` is ``patch``, ``random``
        (a direction drawn for the source and its layer, of the same norm) or ``unrelated``.
        """
        vectors = []
        for row, layer, target in places:
            owner = self.rows[row]
            vector = self._read(owner.unrelated if variant == "unrelated" else owner.source)[layer, target]
            if variant == "random":
                generator = np.random.default_rng([self.recipe.seed, owner.source, self.grid.layers[layer]])
                drawn = torch.from_numpy(generator.standard_normal(len(vector))).float()
                vector = drawn / drawn.norm() * vector.norm()
            vectors.append(vector)
        return torch.stack(vectors)

    def _read(self, source: int) -> torch.Tensor:
        """What one source holds, as it is put in: (source layer, target layer, width)."""
        if source not in self._kept:
            # Each source runs on its own, so that what it holds does not depend on the others.
            read = self.sources[source]
            vectors = _residuals(self.source_model, read.prompt, read.position, self.grid.layers)
            if self.layer_map is None:
                self._kept[source] = vectors[:, None].expand(-1, len(self.grid.target_layers), -1)
            else:
                mapped = [self.layer_map.mapped(vector[None], layer)[0] for layer, vector in enumerate(vectors)]
                self._kept[source] = torch.stack(mapped)
        return self._kept[source]

    @cached_property
    def placeholders(self) -> list[torch.Tensor]:
        """What each target prompt itself holds at its placeholder: (target layer, width) a target."""
        layers = self.grid.target_layers
        return [_residuals(self.model, target.prompt, target.position, layers) for target in self.targets]

    @cached_property
    def layer_map(self) -> LayerMap | None:
        """The map between the models, where the recipe asks for one."""
        options = self.recipe.map
        if options is None:
            return None
        engines = self.source_model.engine, self.model.engine
        layers = self.grid.layers, self.grid.target_layers
        return fit_map(*engines, self.map_ids(self.source_model), self.map_ids(self.model), *layers, options.ridge)

    def map_ids(self, model: Model) -> list[tuple[int, ...]]:
        """The map's texts as one of the models reads them."""
        assert self.recipe.map is not None
        return [prompt.token_ids for prompt in encode_prompts(model, self.recipe.map.prompts)]


def _residuals(model: Model, prompt: Prompt, position: int, layers: Sequence[int]) -> torch.Tensor:
    """``resid_post`` of some layers at one position of a prompt: float32 on the CPU, (layer, width)."""
    recording = model.engine.record([prompt.token_ids], [f"resid_post[{layer}]" for layer in layers])
    return torch.stack([recording.at("resid_post", layer)[0, position].float().cpu() for layer in layers])
