"""How much of the clean run each layer brings back: activation patching in one call, with one number for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import xarray as xr

from nsp.datasets.pairs import pair as make_pair
from nsp.datasets.prompts import PromptLike
from nsp.errors import InputError
from nsp.experiments.activation_patching.mean_figure import patching_figure
from nsp.experiments.figure_display import check_place, show
from nsp.experiments.functions import door
from nsp.model import Model


def layer_recovery(
    model: Model,
    clean: PromptLike,
    corrupt: PromptLike,
    *,
    component: str = "resid_post",
    metric: Any = "kl",
    positions: Any = "last",
    answer: str | None = None,
    distractor: str | None = None,
    spans: Mapping[str, Any] | None = None,
    mode: Literal["denoising", "noising"] = "denoising",
    cumulative: bool = False,
    plot: bool | str | Path = False,
) -> xr.DataArray:
    """How much of the clean run each layer of a component brings back, in percent: dims (layer,).

    One pair, one component, one number for each layer: all chosen positions (and all heads) are patched together. 0 is the
    base run and 100 the donor run; for a distance that is (d_base - d_patched) / d_base x 100.

    Args:
        model: a loaded model.
        clean, corrupt: the two prompts.
        component: what is patched: resid_post, attn_out, mlp_out, z, ...
        metric: as in `activation_patching`; ``kl`` needs no answer, ``logit_diff`` an answer and a distractor.
        positions: last, all, an index, a list, a span. With all positions resid_post is a full recovery at every
            layer, whatever the model.
        cumulative: patch the layers up to each layer together.
        plot: show a figure of it, or write it to a file (``"recovery.png"``).
    """
    check_place(plot)
    if isinstance(metric, list | tuple) and len(metric) != 1:
        raise InputError("layer_recovery takes one metric; activation_patching takes a list")
    if mode not in ("denoising", "noising"):
        raise InputError(f"layer_recovery: mode is denoising or noising, not {mode!r}")
    tree = door("activation_patching")(
        model,
        make_pair(clean, corrupt, answer, distractor, spans=spans),
        components=[component],
        metric=metric,
        positions=positions,
        mode=mode,
        together=["position"],
        cumulative=cumulative,
    )
    effects = tree[f"effects/{component}"].to_dataset()
    name = next(str(name) for name in effects.data_vars if str(name).startswith("recovery_"))
    recovery: xr.DataArray = effects[name].isel(pair=0, drop=True)
    if plot:
        show(patching_figure(tree, name), plot)
    return recovery
