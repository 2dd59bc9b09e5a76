"""An affine map between two models' residual streams, for every pair of layers, fitted on texts that both read.

Ridge regression of the target's ``resid_post`` on the source's, with an intercept. The first token of a text is left
out: its residual stream is unlike any other's (an attention sink), and would rule the fit. Where both tokenizers give
the same tokens every other position is used, else the last one of each text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from nsp.engine.engine import Engine
from nsp.errors import InputError
from nsp.sites import Site
from nsp.statistics.regression import ridge_regression

_MOST = 4096  # tokens that a map is fitted on
_HELD_OUT = 128  # tokens that it is judged on


@dataclass(frozen=True, eq=False)
class LayerMap:
    """Maps from each of some source layers to each of some target layers.

    Attributes:
        source, target: training values, one tensor per layer, axes (token, width); ``held_source`` and ``held_target``
            those of the texts held out.
        ridge: the penalty, relative to the mean variance of a source layer.
    """

    source: tuple[torch.Tensor, ...]
    target: tuple[torch.Tensor, ...]
    held_source: tuple[torch.Tensor, ...]
    held_target: tuple[torch.Tensor, ...]
    ridge: float

    def mapped(self, vectors: torch.Tensor, layer: int) -> torch.Tensor:
        """Vectors of the source layer numbered ``layer``, (vector, width), at every target layer: (vector, target
        layer, target width).

        The map of a vector is a weighted sum of training targets, so one solve serves every target layer.
        """
        mean, weights = self._solved[layer]
        shares = (vectors.double() - mean) @ weights
        return torch.stack(
            [target.mean(0) + shares @ (target - target.mean(0)) for target in map(_double, self.target)], dim=1
        ).float()

    def r2(self) -> np.ndarray:
        """Variance of the held-out targets that the map explains, axes (source layer, target layer); below 0 it is
        worse than their mean.
        """
        explained = np.zeros((len(self.source), len(self.target)))
        spread = [float((held - held.mean(0)).pow(2).sum()) for held in map(_double, self.held_target)]
        for layer in range(len(self.source)):
            mapped = self.mapped(self.held_source[layer], layer).double()
            for other, held in enumerate(map(_double, self.held_target)):
                explained[layer, other] = 1 - float((mapped[:, other] - held).pow(2).sum()) / max(spread[other], 1e-12)
        return explained

    @cached_property
    def _solved(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each source layer its mean, and (width, token) such that a centred vector times it weights the tokens."""
        # Regressed on the tokens themselves, one target a token: what comes back weights the tokens' targets.
        tokens = torch.eye(len(self.source[0]))
        return [(values.double().mean(0), ridge_regression(values, tokens, self.ridge)[0]) for values in self.source]


def fit_map(
    source: Engine,
    target: Engine,
    source_ids: Sequence[Sequence[int]],
    target_ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    target_layers: Sequence[int],
    ridge: float,
) -> LayerMap:
    """Fit the maps on texts, given as each model's token ids. Every fifth text is held out."""
    same = all(tuple(a) == tuple(b) for a, b in zip(source_ids, target_ids, strict=True))
    usable = [row for row, (a, b) in enumerate(zip(source_ids, target_ids, strict=True)) if min(len(a), len(b)) > 1]
    held = usable[4::5]
    kept = [row for row in usable if row not in set(held)]
    if len(kept) < 2 or not held:
        raise InputError(
            f"map.prompts: {len(usable)} texts of two tokens or more; a map needs at least 5, and better hundreds"
        )

    def values(
        engine: Engine, ids: Sequence[Sequence[int]], rows: Sequence[int], wanted: Sequence[int], most: int
    ) -> tuple[torch.Tensor, ...]:
        texts = [ids[row] for row in rows]
        recording = engine.record(texts, [Site.of("resid_post", wanted)])
        places = [
            (row, at) for row, text in enumerate(texts) for at in (range(1, len(text)) if same else (len(text) - 1,))
        ][:most]
        row, at = torch.tensor(places, device=engine.runtime.device).T
        return tuple(recording.at("resid_post", layer)[row, at].float().cpu() for layer in wanted)

    return LayerMap(
        values(source, source_ids, kept, layers, _MOST),
        values(target, target_ids, kept, target_layers, _MOST),
        values(source, source_ids, held, layers, _HELD_OUT),
        values(target, target_ids, held, target_layers, _HELD_OUT),
        ridge,
    )


def _double(values: torch.Tensor) -> torch.Tensor:
    return values.double()
