"""What a lens run says: where the output becomes readable, and what is read before."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.report.summary import Summary, SummaryTable

_SHOWN = 14


def settled_layer(tree: xr.DataTree) -> xr.DataArray:
    """The first layer from which on the lens favours what the model's output favours, dims (prompt, position).

    NaN where a position was not read, or where the last layer read does not favour it either.
    """
    rank = tree["effects/lens"].to_dataset()["output_rank"]
    agrees = (rank == 0).transpose("layer", ...)
    # The last disagreement from the end; the layer after it is the first of those that all agree.
    settled = agrees.isel(layer=slice(None, None, -1)).cumprod("layer").isel(layer=slice(None, None, -1)).astype(bool)
    first = settled.argmax("layer")
    layers = rank["layer"].isel(layer=first).drop_vars("layer").where(settled.any("layer"))
    return layers.assign_attrs(
        long_name="first layer from which on the lens agrees with the output", units="1", method="output_rank is 0"
    )


def headline(tree: xr.DataTree) -> str:
    """The median layer at which the lens settles, in a line."""
    settled = settled_layer(tree).values
    if not np.isfinite(settled).any():
        return "the lens never agrees with the output"
    last = int(tree["effects/lens"].to_dataset()["layer"].values[-1])
    return f"agrees with the output from layer {np.nanmedian(settled):.0f} of {last} on (median)"


def summarise(tree: xr.DataTree) -> Summary:
    """Divergence and entropy by layer, what the lens favours at the last position, and the tokens followed."""
    lens, top = tree["effects/lens"].to_dataset(), tree["effects/top"].to_dataset()
    recipe, model = tree.attrs.get("recipe_resolved", {}), tree.attrs.get("model", {})
    method = recipe.get("method", "?") if isinstance(recipe, dict) else "?"
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {lens.sizes['prompt']} prompt(s), {method} lens",
        headline(tree),
    ]
    layers = _spread(lens["layer"].values)
    shown = lens.sel(layer=layers)
    agrees = (shown["output_rank"] == 0).where(shown["output_rank"] >= 0)
    means = {"entropy": shown["entropy"], "KL from output": shown["divergence"], "agrees": agrees}
    means["next token, nats"] = shown["next_logprob"]
    averages = {name: values.mean(("prompt", "position")).values for name, values in means.items()}
    text = str(tree["inputs"].to_dataset()["text"].values[0])
    position = int(np.flatnonzero((lens["output_rank"].isel(prompt=0, layer=-1) >= 0).values)[-1])
    read = top.isel(prompt=0, position=position).sel(layer=layers).transpose("layer", "token")
    likely = [
        "  ".join(f"{token!r} {prob:.2f}" for token, prob in zip(*ranked, strict=True))
        for ranked in zip(read["token_text"].values, read["token_prob"].values, strict=True)
    ]
    tables = [
        SummaryTable.of("means over prompts and positions", {"layer": layers, **averages}),
        SummaryTable.of(f"most likely at position {int(read['position'])} of {text!r}", {"layer": layers, "tokens": likely}),
    ]
    if "prob" in lens:
        followed = shown.isel(prompt=0, position=position).transpose("token", "layer")
        columns = ("layer", *(name for token in followed["followed"].values for name in (f"{token!r} prob", "rank")))
        pairs = zip(followed["prob"].values.tolist(), followed["rank"].values.tolist(), strict=True)
        rows = zip(layers, *(column for pair in pairs for column in pair), strict=True)
        tables.append(SummaryTable("tokens followed, there", columns, tuple(rows)))
    return Summary(f"{method} lens", tuple(lines), tuple(tables))


def _spread(layers: np.ndarray) -> list[int]:
    places = np.linspace(0, len(layers) - 1, min(_SHOWN, len(layers))).round().astype(int)
    return [int(layers[place]) for place in dict.fromkeys(places.tolist())]
