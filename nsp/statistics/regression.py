"""Ridge regression of many targets at once."""

from __future__ import annotations

import torch


def ridge_regression(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (column, target) and intercept (target,), both float64, of ``y`` (row, target) on ``x`` (row, column).

    ``penalty`` is relative to the mean variance of a column. The intercept is not penalised (Hoerl and Kennard 1970).
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    centred = x - mean_x
    gram = centred.T @ centred
    ridge = penalty * gram.diagonal().mean().clamp_min(1e-12)
    weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=x.dtype), centred.T @ (y - mean_y))
    return weights, mean_y - mean_x @ weights
