"""What a pass costs: the estimate that packing and the dry run share."""

from __future__ import annotations

from dataclasses import dataclass

from nsp.models.geometry import Geometry

# What copying one byte of keys and values costs, in multiply-adds of a matrix product.
_FLOP_PER_BYTE = 12.0


@dataclass(frozen=True)
class Cost:
    """Estimated floating-point operations of one layer: per token, per (query, key) pair, per key copied."""

    per_token: float
    per_pair: float
    per_key: float

    @classmethod
    def of(cls, geometry: Geometry, layer_parameters: int, itemsize: int) -> Cost:
        width = geometry.n_heads * geometry.head_dim
        copied = 4 * (geometry.n_kv_heads + geometry.n_heads) * geometry.head_dim * itemsize
        return cls(2.0 * layer_parameters, 6.0 * width, copied * _FLOP_PER_BYTE)

    def rows(self, count: int, width: int, past: int) -> float:
        """One layer over ``count`` rows of ``width`` columns that read ``past`` trunk positions."""
        keys = past + width
        return count * (width * self.per_token + width * keys * self.per_pair + keys * self.per_key)
