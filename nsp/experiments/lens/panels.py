"""What the report of a lens draws: the grid of likeliest tokens, divergence by layer, and the tokens followed."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.report.panels import (
    Cells,
    Drawing,
    Layer,
    Panel,
    Series,
    View,
    averaged,
    chart,
    numbers,
    panel,
    short,
    visible,
)

_TOPS = 3
_MOST = 12  # prompts whose grids are on the page


def panels(tree: xr.DataTree) -> list[Drawing]:
    """The grid with the likeliest token in each cell, then lines over layers."""
    lens = tree["effects/lens"].to_dataset().load()
    texts = [short(str(text)) for text in tree["inputs"].to_dataset()["text"].values]
    drawn: list[Drawing] = [_grid(tree, lens, texts)]
    means = lens[["divergence", "entropy"]].mean("position", skipna=True)
    series = [
        averaged("KL from the output", means["divergence"], "layer"),
        averaged("entropy", means["entropy"], "layer"),
    ]
    name = f"mean over {len(texts)} prompts and their positions" if len(texts) > 1 else "mean over positions"
    drawn.append(
        chart(
            "lens by layer",
            "how far the lens is from the output, and how sure it is",
            "nat",
            "nats",
            "layer",
            [View(name, series)],
            finding="",
        )
    )
    if "prob" in lens:
        drawn.append(_followed(lens, texts))
    return drawn


def _grid(tree: xr.DataTree, lens: xr.Dataset, texts: list[str]) -> Panel:
    top = tree["effects/top"].to_dataset()
    inputs = tree["inputs"].to_dataset()["token_text"].values
    rows = [str(layer) for layer in top["layer"].values]
    positions = top["position"].values
    layers = []
    for prompt, text in enumerate(texts[:_MOST]):
        one = top.isel(prompt=prompt).transpose("layer", "position", "token").load()
        beside = lens.isel(prompt=prompt).transpose("layer", "position", ...)
        probs = np.asarray(one["token_prob"].values, dtype=np.float64)
        read = np.isfinite(probs[..., 0]).any(axis=0)
        words = np.vectorize(lambda token: visible(str(token)), otypes=[object])(one["token_text"].values)
        tops = min(_TOPS, probs.shape[-1])
        details: dict[str, Cells] = {}
        for rank in range(tops):
            told = [[str(word) or None for word in row] for row in words[:, read, rank]]
            details[f"top {rank + 1}"] = told
            if rank:
                details[f"p {rank + 1}"] = [numbers(row) for row in probs[:, read, rank]]
        details["KL from the output, nats"] = [numbers(row) for row in beside["divergence"].values[:, read]]
        details["rank of the output's token"] = [numbers(row) for row in beside["output_rank"].values[:, read]]
        columns = [f"{visible(str(inputs[prompt][place]))} {place}" for place in positions[read]]
        layers.append(
            Layer(
                f"prompt {prompt}: {text}",
                [numbers(row) for row in probs[:, read, 0]],
                details=details,
                columns=columns,
            )
        )
    first = layers[0]
    return panel(
        "effects: top, likeliest token", "probability of the likeliest next token, which each cell names", "1", ("layer", "position"),
        rows, first.columns or [], layers, variable="token_prob", reach=1.0, written="top 1", finding="",
        note=f"the first {_MOST} of {len(texts)} prompts" if len(texts) > _MOST else "",
    )  # fmt: skip


def _followed(lens: xr.Dataset, texts: list[str]) -> Drawing:
    """The followed tokens' probability at each prompt's last position."""
    views = []
    for prompt, text in enumerate(texts[:_MOST]):
        one = lens.isel(prompt=prompt)
        place = int(np.flatnonzero((one["output_rank"].isel(layer=-1) >= 0).values)[-1])
        at = one.isel(position=place)
        depth = at["layer"].values
        probs, ranks = (at[key].transpose("token", "layer").values for key in ("prob", "rank"))
        series = [
            Series(
                repr(str(name)),
                [float(layer) for layer in depth],
                numbers(probs[token]),
                labels=[f"layer {layer}, rank {rank}" for layer, rank in zip(depth, ranks[token], strict=True)],
            )
            for token, name in enumerate(lens["followed"].values)
        ]
        views.append(View(f"prompt {prompt}, last position: {text}", series))
    return chart(
        "tokens followed", "probability as the next token at the last position", "1", "probability", "layer", views
    )
