"""In which order a model's submodules run, found by watching one small forward pass: plain torch.

As `nsp.engine.kernels`, this also travels to servers, where a model is watched that lies here without its weights.
"""

from __future__ import annotations

from typing import Any

import torch

OUTPUT, TUPLE = 1, 2


def watched(root: Any, layers: str, count: int) -> torch.Tensor:
    """What the submodules of the first ``count`` layers do in one forward pass: (event, 4), in order.

    A row is the layer, the submodule's number in its ``modules()``, what happens (0: it receives, 1: it returns a
    tensor, 3: a tuple), and how wide the (first) tensor is that it returns.
    """
    events: list[list[int]] = []
    hooks: list[Any] = []
    for layer in range(count):
        for number, module in enumerate(root.get_submodule(f"{layers}.{layer}").modules()):

            def before(_module: Any, _args: Any, place: Any = (layer, number)) -> None:
                events.append([*place, 0, 0])

            def after(_module: Any, _args: Any, output: Any, place: Any = (layer, number)) -> None:
                returned = output[0] if isinstance(output, tuple) else output
                width = int(returned.shape[-1]) if isinstance(returned, torch.Tensor) and returned.dim() else 0
                events.append([*place, 1 + 2 * isinstance(output, tuple), width])

            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=next(root.parameters()).device)
            root(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.tensor(events, dtype=torch.long).reshape(-1, 4)
