"""Where a component's values are kept: one slot for each tensor, whatever names it goes by."""

from __future__ import annotations

from nsp.sites import COMPONENTS

BOUNDARY = "boundary"
Slot = tuple[str, int]
"""(component, layer); (``boundary``, l) is what layer l receives, (``boundary``, n_layers) the final residual stream."""


def slot_of(component: str, layer: int) -> Slot:
    """The slot of a component: the three names of the residual stream between layers share one."""
    known = COMPONENTS.get(component)
    if known is None or known.boundary is None:
        return (component, layer)
    return (BOUNDARY, layer + known.boundary if known.layered else 0)


def stream_slots(n_layers: int) -> list[Slot]:
    """The residual stream at every boundary, the embedding and the final one included."""
    return [(BOUNDARY, layer) for layer in range(n_layers + 1)]
