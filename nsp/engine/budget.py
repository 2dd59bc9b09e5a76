"""How much memory a run may take, and what that allows a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from nsp.errors import InputError
from nsp.memory import parse_memory

if TYPE_CHECKING:
    from nsp.engine.branches import Branches
    from nsp.engine.pack import Pass
    from nsp.engine.runtime import Runtime

# A pass larger than this gains nothing on a CPU: its activations leave the cache. A GPU wants as many as fit.
_CPU_TOKENS = 3072
_GPU_TOKENS = 65536
# What blocks of many sizes, taken and freed in turn, cost beside their sum (measured: benchmarks/memory.py).
_FRAGMENTED = 1.15
# The share of free memory that a run takes where no budget is given.
_SHARE = 0.4


@dataclass(frozen=True)
class Budget:
    """Bytes that the passes of a run may take beside the model and the trunk."""

    bytes: int

    @classmethod
    def of(cls, memory: str | float | None, device: torch.device) -> Budget:
        """A budget as given (``4GB``, ``512MiB``, bytes), or a share of what is free on the device."""
        if memory is None:
            return cls(int(free_memory(device) * _SHARE))
        return cls(parse_memory(memory))

    def branch_tokens(self, runtime: Runtime, branches: Branches) -> int:
        """Columns that one pass of the branch path should have."""
        most = _GPU_TOKENS if runtime.device.type == "cuda" else _CPU_TOKENS
        live = branches.live
        past = int(branches.start[live].max()) if len(live) else 0
        longest = int(branches.lengths.max()) if len(live) else 1
        one = longest * branch_token_bytes(runtime, past, longest)
        if self.bytes < one:
            raise InputError(
                f"the memory budget of {size_text(self.bytes)} is too small for one branch of {longest} tokens "
                f"({size_text(one)}); give --memory more, or fewer positions"
            )
        allowed = max(longest, int(self.bytes / branch_token_bytes(runtime, past, min(longest, 64))))
        return min(most, allowed)

    def plain_rows(self, runtime: Runtime, length: int) -> int:
        """Rows that one batch of the plain path may have."""
        most = _GPU_TOKENS if runtime.device.type == "cuda" else _CPU_TOKENS
        each = length * plain_token_bytes(runtime, length)
        allowed = int(self.bytes / each)
        if allowed < 1:
            raise InputError(
                f"the memory budget of {size_text(self.bytes)} is too small for one forward pass of {length} tokens ({size_text(each)})"
            )
        return max(1, min(allowed, most // length))


def branch_token_bytes(runtime: Runtime, past: int, width: int) -> float:
    """At most so many bytes for each column of a branch pass: those of a row that joins at the first layer."""
    return _row_bytes(runtime, past, width, runtime.geometry.n_layers, copied=True) / max(1, width)


def pass_bytes(runtime: Runtime, made: Pass) -> float:
    """Peak bytes of a packed pass of the branch path."""
    n_layers = runtime.geometry.n_layers
    # The keys and values of a single base run are a view of its own; of several, a copy a row.
    copied = len({row.base for row in made.rows}) > 1
    return sum(_row_bytes(runtime, made.past, made.width, n_layers - row.join, copied=copied) for row in made.rows)


def shared_pass_bytes(runtime: Runtime, rows: int, width: int, past: int) -> float:
    """Peak bytes of a pass that bases and branches share (see `nsp.engine.shared_pass`): it keeps one layer's keys and values."""
    return rows * _row_bytes(runtime, past, width, 1, copied=True)


def _row_bytes(runtime: Runtime, past: int, width: int, layers: int, *, copied: bool) -> float:
    """Peak bytes of one row of a branch pass, which runs through so many layers.

    Its keys and values of all those layers, the activations of one layer, the mask, and the state it joins with.
    """
    geometry, size = runtime.geometry, runtime.dtype.itemsize
    heads = geometry.n_heads * geometry.head_dim
    keys = 2 * geometry.n_kv_heads * geometry.head_dim * (past + width + (past if copied else 0)) * layers
    activations = (8 * geometry.d_model + 3 * geometry.d_mlp) * width + 4 * heads * (past + width)
    mask = 4 * width * (past + width)
    return _FRAGMENTED * size * (keys + activations + mask + 2 * geometry.d_model * width)


def plain_token_bytes(runtime: Runtime, length: int) -> float:
    """Peak bytes for each token of a plain batch."""
    geometry, size = runtime.geometry, runtime.dtype.itemsize
    return (10 * geometry.d_model + 3 * geometry.d_mlp + 4 * geometry.n_heads * geometry.head_dim + 2 * length) * size


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def size_text(count: float) -> str:
    """Bytes in fitting units: ``1.5 GB``, ``20 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
