"""What heads and neurons write: the columns of a component's output projection."""

from __future__ import annotations

import torch

from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.models.geometry import submodule


def output_directions(runtime: Runtime, component: str, layer: int) -> torch.Tensor:
    """What each column of a component writes per unit of activation: (column, width of the residual stream).

    As the projection makes it, before a residual multiplier; on a server it stays there. Raises InputError where the component is
    not the input of one plain matrix: neurons of fused experts, quantised weights.
    """
    geometry = runtime.geometry
    where = geometry.where(component)
    if where.side != "input":
        raise InputError(f"{geometry.table.name}: {component} of fused experts share no output projection; no unit has a direction of its own")
    geometry.require(component, (layer,))
    path = f"{geometry.table.layers}.{layer}.{where.module}"
    module = submodule(runtime.module, path)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise InputError(f"layer {layer}: the output projection of {component} is quantised; load the model without quantization")
    stored = runtime.weight(f"{path}.weight").detach()
    # transformers' Conv1D keeps (in, out), a Linear (out, in).
    return stored if hasattr(module, "nf") else stored.transpose(0, 1)
