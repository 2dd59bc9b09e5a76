"""What each layer removes of the divergence between two models, prompt by prompt, and which removes most: the star layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A removal below this is rounding, not an effect: nats, and as a share of the unpatched divergence.
_NOISE, _NOISE_SHARE = 1e-6, 1e-3
# Layers that remove nearly as much as the best one are tied with it.
_TIE = 0.05
# A profile whose best layer removes less than this many times the mean over layers is flat.
_FLAT = 2.0


@dataclass(frozen=True)
class LayerProfile:
    """What one prompt's profile says.

    Attributes:
        layer: the star layer, None where no layer removes divergence (or nothing was computed).
        ties: the other layers that remove at least 95 % of what the star layer does; the star is the lowest of them.
        flat: the star layer stands out by less than twice the mean over layers.
        removed: nats that the star layer removes; ``share`` of the unpatched divergence.
        status: ``star``, ``tie``, ``flat``, or ``none``.
    """

    layer: int | None
    ties: tuple[int, ...] = ()
    flat: bool = False
    removed: float = 0.0
    share: float = float("nan")

    @property
    def status(self) -> str:
        if self.layer is None:
            return "none"
        return "tie" if self.ties else "flat" if self.flat else "star"


def is_stepwise(component: str, patch: str) -> bool:
    """Whether each cell also holds what lower layers removed, so that a layer's own part is the step to it.

    A patched residual stream replaces everything that came before it, so there single patches are cumulative too.
    """
    return patch == "cumulative" or component.startswith("resid")


def removed_by_layer(base: np.ndarray, kl: np.ndarray, *, stepwise: bool) -> np.ndarray:
    """Nats that each layer removes: (prompt,) unpatched and (prompt, layer) patched divergences -> (prompt, layer)."""
    before = np.concatenate([base[:, None], kl[:, :-1]], axis=1) if stepwise else base[:, None]
    removed: np.ndarray = before.astype(np.float64) - kl
    return removed


def layer_profile(base: float, removed: np.ndarray, layers: Sequence[int]) -> LayerProfile:
    """The profile of one prompt, from its unpatched divergence and what each layer removes, axis (layer,), in nats."""
    if len(removed) == 0 or not np.isfinite(removed).all() or not np.isfinite(base):
        return LayerProfile(None)
    best = float(removed.max())
    if best <= max(_NOISE, _NOISE_SHARE * base):
        return LayerProfile(None)
    near = np.flatnonzero(removed >= (1 - _TIE) * best)
    flat = len(removed) > 2 and best < _FLAT * float(np.abs(removed).mean())
    share = best / base if base > 0 else float("nan")
    return LayerProfile(int(layers[near[0]]), tuple(int(layers[at]) for at in near[1:]), flat, best, share)
