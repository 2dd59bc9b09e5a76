"""Figures of a lens: the likeliest tokens, its numbers by layer, and the tokens followed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import xarray as xr

from nsp.report.default_figures import figures_by_dims
from nsp.report.figures import SHARE, Figure, Grid, Lines, Series, View, figure
from nsp.report.labels import short, token_label, visible
from nsp.report.series import mean_series

_TOPS = 3


def figures(tree: xr.DataTree) -> list[Figure]:
    """The grid with the likeliest token in each cell, then lines over layers, and heatmaps of its numbers."""
    texts = [short(str(text)) for text in _texts(tree)]
    views = [
        View(make=partial(_likeliest, tree, prompt), name=f"prompt {prompt}: {text}" if text else f"prompt {prompt}", item=prompt)
        for prompt, text in enumerate(texts)
    ]
    found = [
        figure("lens", "effects: top, likeliest token", *views, no_mean="a lens's tokens have no mean; choose one prompt with --pair")
    ]
    if "lens" not in tree["effects"].children:
        return found
    lens = tree["effects/lens"].to_dataset()
    over = f"mean over {len(texts)} prompts and their positions" if len(texts) > 1 else "mean over positions"
    found.append(figure("by-layer", "lens by layer", View(make=partial(_by_layer, lens), name=over)))
    if "prob" in lens:
        last = [
            View(make=partial(_followed, lens, prompt), name=f"prompt {prompt}, last position: {text}", item=prompt)
            for prompt, text in enumerate(texts)
        ]
        found.append(figure("followed", "tokens followed", *last))
    heatmaps = figures_by_dims(tree, ["effects/lens"])
    return found + [replace(one, in_report=False) for one in heatmaps if one.what == "heatmap"]


def _texts(tree: xr.DataTree) -> list[object]:
    inputs = tree["inputs"].to_dataset()
    return list(inputs["text"].values if "text" in inputs else [""] * inputs.sizes["prompt"])


def _likeliest(tree: xr.DataTree, prompt: int) -> Grid:
    """What each layer would predict at each position of one prompt: the likeliest token, coloured by its probability."""
    top = tree["effects/top"].to_dataset()
    count = top.sizes["prompt"]
    one = top.isel(prompt=prompt).transpose("layer", "position", "token").load()
    tokens = tree["inputs"].to_dataset()["token_text"].isel(prompt=prompt)
    texts = tokens.reindex(position=one["position"].values, fill_value="").values
    words = np.vectorize(lambda text: visible(str(text)), otypes=[object])(one["token_text"].values)
    probs = np.asarray(one["token_prob"].values, dtype=np.float64)
    read = np.isfinite(probs[..., 0])
    shown = np.flatnonzero(read.any(axis=0))
    likely = np.full(read.shape, "", dtype=object)
    for place in zip(*np.nonzero(read), strict=True):
        ranked = zip(words[place][:_TOPS], probs[place][:_TOPS], strict=True)
        likely[place] = ", ".join(f"{word} {prob:.3f}" for word, prob in ranked)
    details = {"most likely": likely[:, shown]}
    if "lens" in tree["effects"].children:
        beside = tree["effects/lens"].to_dataset().isel(prompt=prompt).load()
        for name, variable in (("KL from the output, nats", "divergence"), ("rank of the output's token", "output_rank")):
            if variable in beside:
                values = beside[variable].transpose("layer", "position")
                details[name] = np.asarray(values.where(values >= 0) if variable == "output_rank" else values, dtype=float)[:, shown]
    return Grid(
        remark=(f"prompt {prompt} of {count}, " if count > 1 else "") + "the likeliest next token in each cell",
        values=np.where(read, probs[..., 0], np.nan)[:, shown],
        rows=tuple(map(str, one["layer"].values)),
        columns=tuple(token_label(str(texts[at]), one["position"].values[at]) for at in shown),
        y="layer",
        x="position",
        meaning="probability of the likeliest next token",
        scale=SHARE,
        texts=np.where(read, words[..., 0], "")[:, shown].astype(str),
        details=details,
        finding="",
    )


def _by_layer(lens: xr.Dataset) -> Lines:
    means = lens[["divergence", "entropy"]].load().mean("position", skipna=True)
    names = {"divergence": "KL from the output", "entropy": "entropy"}
    series = tuple(mean_series(name, means[variable], "layer") for variable, name in names.items())
    meaning = "how far the lens is from the output, and how sure it is"
    return Lines(series=series, x="layer", y="nats", meaning=meaning, units="nats", whole=True, finding="")


def _followed(lens: xr.Dataset, prompt: int) -> Lines:
    """The followed tokens' probability at one prompt's last position."""
    one = lens.isel(prompt=prompt).load()
    at = one.isel(position=int(np.flatnonzero((one["output_rank"].isel(layer=-1) >= 0).values)[-1]))
    depth = at["layer"].values
    probs, ranks = (at[key].transpose("token", "layer").values for key in ("prob", "rank"))
    series = [
        Series(
            name=repr(str(name)),
            x=depth.astype(float),
            y=np.asarray(probs[token], dtype=np.float64),
            notes=tuple(f"layer {layer}, rank {rank}" for layer, rank in zip(depth, ranks[token], strict=True)),
        )
        for token, name in enumerate(lens["followed"].values)
    ]
    meaning = "probability as the next token at the last position"
    return Lines(series=tuple(series), x="layer", y="probability", meaning=meaning, whole=True)
