"""A direction's two interventions: out of every write of the residual stream, and into the stream at one layer.

*Directional ablation* replaces what the embedding, every attention layer and every MLP write by ``x - (x . d) d`` with
``d`` of length 1, at all positions, so that no layer ever reads the direction. *Addition* adds the vector to the stream
that one layer receives, at all positions. Arditi et al. 2024, section 2.4. Both are plain interventions: state them in a
trace (``t.add(*directional_ablation(model, d))``), and with ``t.generate(when="both")`` they act on the prompt and on
every generated token.
"""

from __future__ import annotations

from typing import Any

from nsp.errors import InputError
from nsp.interventions import Ablate, Inject, ablate, inject
from nsp.model import Model
from nsp.sites import COMPONENTS

# Everything that adds to the residual stream, which is then their sum.
_WRITES = tuple(known.name for known in COMPONENTS.values() if known.adds)


def directional_ablation(model: Model, direction: Any) -> tuple[Ablate, ...]:
    """The ablations that keep ``direction`` out of the residual stream, at every layer and position.

    Args:
        direction: dims (neuron,), of any length but 0; or (prompt, 1, neuron), one for each base prompt.

    Raises:
        InputError: a layer of the model writes to the stream by something other than attention and an MLP.
    """
    geometry = model.geometry
    for component in _WRITES:
        missing = sorted(set(range(geometry.n_layers)) - set(geometry.layers_of(component)))
        if missing:
            raise InputError(
                f"directional ablation needs every write of the residual stream, and layer {missing[0]} of {model.name} "
                f"has no {component}; its layers write in another way"
            )
    sites = ("embed @ *", *(f"{component}[*] @ *" for component in _WRITES))
    return tuple(ablate(site, "direction", direction=direction) for site in sites)


def direction_addition(layer: int, direction: Any, coefficient: float = 1.0) -> tuple[Inject, ...]:
    """The addition of ``coefficient * direction`` to what a layer receives, at every position.

    ``direction`` has dims (neuron,), or (prompt, 1, neuron) with one for each base prompt.
    """
    return (inject(f"resid_pre[{layer}] @ *", direction, coefficient=coefficient),)
