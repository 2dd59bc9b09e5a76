"""The final norm with its scale held at one value, which makes it linear: what direct logit attribution stands on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsp.errors import InputError

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 0.05, torch.float16: 0.02}
"""How far parts may sum to something else than the whole, relative to their size, by dtype."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """The final norm with its scale held: ``norm(x) = gain * centre(x) + bias`` at the x it was made for.

    Attributes:
        gain: (width), scale included; ``bias`` (width). ``centred`` says whether the mean is taken off first.
    """

    gain: torch.Tensor
    bias: torch.Tensor
    centred: bool

    def direction(self, weights: torch.Tensor) -> torch.Tensor:
        """The vector whose product with a part of x is that part's share of ``weights . norm(x)``."""
        scaled = weights * self.gain
        return scaled - scaled.mean() if self.centred else scaled


def frozen_norm(norm: torch.nn.Module, value: torch.Tensor) -> FrozenNorm:
    """Hold a norm's scale at ``value`` (width); works for RMS and layer norms, whatever their weights are called.

    Weights are found by applying the norm to a balanced vector, whose norm is known, and its negative. InputError where
    the norm is of neither kind.
    """
    dtype, x = next(norm.parameters(), value).dtype, value.double()

    def applied(vector: torch.Tensor) -> torch.Tensor:
        given = vector.to(value.device, torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
        with torch.no_grad():
            return norm(given.to(dtype)[None, None])[0, 0].double()  # type: ignore[no-any-return]

    probe = torch.ones(len(x), dtype=torch.float64, device=value.device)
    probe[1::2] = -1.0
    if len(x) % 2:
        probe[-3:] = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)
    large = probe * 1e3  # so that the norm's epsilon does not matter
    plus, minus = applied(large), applied(-large)
    weight = (plus - minus) / 2 / (probe / probe.pow(2).mean().sqrt())
    bias = (plus + minus) / 2
    whole = applied(value)
    for centred in (False, True):
        centre = x - x.mean() if centred else x
        linear = weight * centre
        size = linear.norm()
        scale = (whole - bias) @ linear / (size * size)
        error = (whole - bias - scale * linear).norm() / (whole - bias).norm()
        if float(error) < 30 * TOLERANCE.get(dtype, 1e-4):
            return FrozenNorm(scale * weight, bias, centred)
    raise InputError(f"{type(norm).__name__} is neither a layer norm nor an RMS norm, so its scale cannot be held")
