"""Attention masks of four axes: what each token may see, with sliding windows cut in where layers have them."""

from __future__ import annotations

from typing import Any

import torch

from nsp.engine.runtime import Runtime


def layer_masks(runtime: Runtime, sees: torch.Tensor, queries_at: torch.Tensor, keys_at: torch.Tensor) -> Any:
    """The additive mask (row, 1, query, key) that a model takes, or a dict of masks by attention type.

    Args:
        sees: bool (row, query, key), without windows.
        queries_at, keys_at: positions (row, query) and (row, key); a window counts positions, not columns.
    """
    windows = {window for window in runtime.geometry.windows if window is not None}
    if not windows:
        return additive(sees, runtime.dtype)
    if len(windows) > 1:
        raise ValueError(f"layers with different sliding windows ({sorted(windows)}) need the plain path")
    near = queries_at[:, :, None] - keys_at[:, None, :] < windows.pop()
    windowed = additive(sees & near, runtime.dtype)
    if runtime.geometry.table.window == "by_type":
        return {"full_attention": additive(sees, runtime.dtype), "sliding_attention": windowed}
    return windowed


def additive(sees: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is seen, the dtype's lowest number elsewhere: (row, 1, query, key)."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, lowest)[:, None]
