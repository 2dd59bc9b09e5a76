"""Figures of steering: every number over the multipliers, and each prompt's texts."""

from __future__ import annotations

from functools import partial

import xarray as xr

from nsp.report.figures import Figure, Grid, Lines, View, figure
from nsp.report.labels import meaning_and_units, short, visible
from nsp.report.series import mean_series
from nsp.report.site_panels import labelled_grid


def figures(tree: xr.DataTree) -> list[Figure]:
    """What steering does by multiplier, means over prompts with intervals, and prompts against multipliers with the texts."""
    effects = tree["effects/next_token"].to_dataset()
    count = effects.sizes["prompt"]

    def sweep(title: str, y: str, *parts: tuple[str, xr.DataArray], finding: str | None = None) -> Figure:
        view = View(make=partial(_sweep, parts, y, finding), name=f"mean over {count} prompts" if count > 1 else "")
        return figure("steering", title, view)

    found = [sweep("next token", "KL", ("KL", effects["kl"]))]
    if "tokens" in tree["effects"].children:
        tokens = tree["effects/tokens"].to_dataset()
        texts = [visible(str(text)) for text in tokens["token_text"].values]
        parts = [(text, tokens["prob"].isel(token=at, drop=True)) for at, text in enumerate(texts)]
        found.append(sweep("tokens followed", "probability", *parts))
    if "generations" in tree.children:
        generated = tree["generations"].to_dataset()
        told = ("perplexity", "repetition")
        found += [sweep(f"{name} of the texts", name, (name, generated[name]), finding="") for name in told]
        if "text" in generated:
            found.append(figure("texts", "texts", partial(_texts, tree, generated)))
    return found


def _sweep(parts: tuple[tuple[str, xr.DataArray], ...], y: str, finding: str | None) -> Lines:
    first = parts[0][1]
    count = first.sizes["prompt"]
    remark = f"mean of {count} prompts, 95 % interval" if count > 1 else "one prompt, no interval"
    series = tuple(mean_series(name, values.load(), "direction") for name, values in parts)
    return Lines(series=series, x="multiplier", y=y, remark=remark, finding=finding, **meaning_and_units(first))


def _texts(tree: xr.DataTree, generated: xr.Dataset) -> Grid:
    """Prompts against multipliers: the perplexity of each text, and the text."""
    part = generated[["perplexity", "repetition", "text"]].transpose("prompt", "direction", ...).load()
    texts = [short(str(text), 40) for text in tree["inputs"].to_dataset()["text"].values]
    part = part.assign_coords(prompt=texts, multiplier=("direction", [f"{value:g}" for value in part["multiplier"].values]))
    part = part.isel(prompt=slice(None, None, -1))  # the first on top
    return labelled_grid(
        part["perplexity"],
        details={"text": part["text"].values.astype(object), "repetition": part["repetition"].values},
        meaning="perplexity of each text in the unsteered model; point at a cell to read the text",
        finding="",
    )
