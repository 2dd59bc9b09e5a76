"""Figures of single experiments, prepared from a run's tree: success grids, lens grids, sweeps, gaps, summaries."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.experiments.attribution.summary import curves
from nsp.experiments.bias_scan.tables import ScanResult
from nsp.experiments.capture.summary import unit_statistics
from nsp.experiments.patchscope.results import success_rates
from nsp.report.figures.prepared import (
    Boxes,
    Curve,
    Curves,
    Grid,
    Panel,
    Scale,
    meaning,
    token_label,
    visible,
)
from nsp.report.figures.sites import Which
from nsp.statistics import mean_effects

_TOPS = 3  # tokens of a lens's cell that are named when it is pointed at


def success_panels(tree: xr.DataTree) -> dict[str, Panel]:
    """A patchscope's share of sources that succeed, source layer against target layer; its controls beside it."""
    rates = success_rates(tree)
    n = rates["n"].values
    count = f"{n.max()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    without = _numbers(rates["none"])
    said = f"n = {count} sources; without a patch {float(without.flat[0]):.2f}" if without.size else ""
    names = {"rate": "patch", "random": "random vector", "unrelated": "unrelated source"}
    found: dict[str, Panel] = {}
    for variable, name in names.items():
        if variable not in rates:
            continue
        values = _numbers(rates[variable].transpose("layer", "target_layer"))
        ends = [_numbers(rates[end].transpose("layer", "target_layer")) for end in ("low", "high")]
        found[name] = Grid(
            remark=said if variable == "rate" else "",
            values=values,
            rows=_labels(rates, "layer"),
            columns=_labels(rates, "target_layer"),
            y="source layer",
            x="target layer",
            meaning="share of sources with a partial or strong match",
            scale=Scale(0.0, 1.0, None),
            low=ends[0] if variable == "rate" else None,
            high=ends[1] if variable == "rate" else None,
        )
    if not any(np.isfinite(panel.values).any() for panel in found.values() if isinstance(panel, Grid)):
        raise InputError("no text of this run was judged: its sources have no phrases to match")
    return found


def lens_panel(tree: xr.DataTree, prompt: Which) -> Grid:
    """What each layer would predict at each position of one prompt: the likeliest token, coloured by its probability."""
    top = tree["effects/top"].to_dataset()
    if prompt == "mean":
        raise InputError("a lens's tokens have no mean; choose one prompt with --pair")
    count = top.sizes["prompt"]
    if not 0 <= prompt < count:
        has = "prompt 0 only" if count == 1 else f"0 to {count - 1}"
        raise InputError(f"there is no prompt {prompt}; the store has {has}")
    one = top.isel(prompt=prompt).transpose("layer", "position", "token").load()
    texts = tree["inputs"].to_dataset()["token_text"].isel(prompt=prompt)
    tokens = texts.reindex(position=one["position"].values, fill_value="").values
    words = np.vectorize(lambda text: visible(str(text)), otypes=[object])(one["token_text"].values)
    probs = _numbers(one["token_prob"])
    read = np.isfinite(probs[..., 0])
    shown = np.flatnonzero(read.any(axis=0))
    tops = np.empty(read.shape, dtype=object)
    for place in np.ndindex(read.shape):
        ranked = zip(words[place][:_TOPS], probs[place][:_TOPS], strict=True)
        tops[place] = ", ".join(f"{word} {prob:.3f}" for word, prob in ranked) if read[place] else ""
    return Grid(
        remark=(f"prompt {prompt} of {count}, " if count > 1 else "") + "the likeliest next token in each cell",
        values=np.where(read, probs[..., 0], np.nan)[:, shown],
        rows=_labels(one, "layer"),
        columns=tuple(token_label(str(tokens[at]), one["position"].values[at]) for at in shown),
        y="layer",
        x="position",
        meaning="probability of the likeliest next token",
        scale=Scale(0.0, 1.0, None),
        texts=np.where(read, words[..., 0], "")[:, shown].astype(str),
        details={"most likely": tops[:, shown]},
    )


def steering_panels(tree: xr.DataTree) -> dict[str, Panel]:
    """What steering does by multiplier, means over prompts with intervals: divergence, tokens followed, the texts."""
    effects = tree["effects/next_token"].to_dataset()
    panels: dict[str, Panel] = {"next token": _sweep([("", effects["kl"])], meaning(effects["kl"], "kl"))}
    if "tokens" in tree["effects"].children:
        followed = tree["effects/tokens"].to_dataset()
        parts = [
            (visible(str(text)), followed["prob"].isel(token=place, drop=True))
            for place, text in enumerate(followed["token_text"].values)
        ]
        panels["tokens followed"] = _sweep(parts, meaning(followed["prob"], "prob"))
    if "generations" in tree.children:
        made = tree["generations"].to_dataset()
        for name in ("perplexity", "repetition"):
            panels[f"{name} of the texts"] = _sweep([("", made[name])], meaning(made[name], name))
    return panels


def _sweep(parts: list[tuple[str, xr.DataArray]], said: str) -> Curves:
    found = []
    count = parts[0][1].sizes["prompt"]
    for name, values in parts:
        order = np.argsort(values["multiplier"].values, kind="stable")
        x = np.asarray(values["multiplier"].values, dtype=np.float64)[order]
        means = mean_effects(values.load().reset_coords(drop=True).rename(prompt="pair"))
        y, low, high = (_numbers(means[one])[order] for one in ("mean", "low", "high"))
        found.append(Curve(name, x, y, low if count > 1 else None, high if count > 1 else None))
    remark = f"mean of {count} prompts, 95 % interval" if count > 1 else "one prompt, no interval"
    return Curves(remark, tuple(found), "multiplier", said)


def gap_panel(tree: xr.DataTree) -> Boxes:
    """A bias scan's pair gaps by type of bias: how much likelier the stereotyping sentence is, in each model."""
    scan = ScanResult(tree)
    series = {"aligned": scan.baseline["logprob_aligned"], "base": scan.baseline["logprob_base"]}
    if scan.ablation is not None:
        series["base, found neurons ablated"] = scan.ablation["logprob"]
    kinds = np.array([str(scan.inputs["bias_type"].values[more]) for more, _ in scan.pairs])
    groups = ["all", *scan.bias_types] if len(scan.bias_types) > 1 else list(scan.bias_types)
    members = [np.full(len(kinds), True) if kind == "all" and len(groups) > 1 else kinds == kind for kind in groups]
    more, less = (np.array(side, dtype=int) for side in zip(*scan.pairs, strict=True))
    gaps = [_numbers(values)[more] - _numbers(values)[less] for values in series.values()]
    left = int(sum((~np.isfinite(gap)).sum() for gap in gaps))
    unfinished = f"; {left} not computed" if left else ""
    return Boxes(
        remark=f"boxes: quartiles and median, whiskers 5 to 95 %, a point a pair{unfinished}",
        groups=tuple(f"{kind}  (n = {int(those.sum())})" for kind, those in zip(groups, members, strict=True)),
        series=tuple(series),
        values=tuple(tuple(gap[those] for those in members) for gap in gaps),
        y="type of bias (n pairs)",
        meaning="gap: log P(more stereotyping) less log P(less stereotyping) [nats]",
    )


def capture_panels(tree: xr.DataTree, component: str) -> dict[str, Panel]:
    """What the units of a captured component hold, by layer: the spread over units of their mean, deviation, maximum."""
    found = unit_statistics(tree, component)
    group = tree[f"activations/{component}"].to_dataset()
    tokens = int(tree["inputs"]["n_tokens"].sum())
    units = int(np.prod([size for dim, size in found.sizes.items() if dim != "layer"]))
    unit = str(group["mean"].attrs.get("units", ""))
    layers = np.asarray(found["layer"].values, dtype=np.float64)
    names = {"mean": "mean of a unit", "std": "standard deviation of a unit", "max": "largest value of a unit"}
    panels: dict[str, Panel] = {}
    for variable, name in names.items():
        flat = _numbers(found[variable].transpose("layer", ...)).reshape(len(layers), -1)
        low, middle, high = np.nanpercentile(flat, [5, 50, 95], axis=1)
        spread = Curve("median unit, band: 5 to 95 % of units", layers, middle, low, high)
        # Single units lie orders of magnitude above the rest: on a logarithmic axis, where that can be, both are seen.
        several = variable != "mean"
        found_curves = (spread, Curve("largest unit", layers, flat.max(axis=1))) if several else (spread,)
        panels[name] = Curves(
            remark=f"n = {units} units a layer, over {tokens} tokens"
            + ("" if several else "; band: 5 to 95 % of units"),
            curves=found_curves,
            x="layer",
            meaning=f"{name} [{unit}]" if unit not in ("", "1") else name,
            levels=() if several else (0.0,),
            log_y=several and bool((low > 0).all()),
        )
    return panels


def faithfulness_panel(tree: xr.DataTree, ablation: str) -> Curves:
    """Faithfulness by circuit size, a curve a method; random circuits, where the run has them, aside."""
    found = curves(tree, ablation)
    stored = tree[f"circuit/curves-{ablation}"].to_dataset()
    prompts = stored.sizes.get("prompt", 1)
    sizes = np.asarray(found["proportion"].values, dtype=np.float64)
    rows = _numbers(found["faithfulness"])
    said = "one prompt" if prompts == 1 else f"the metric's mean over {prompts} prompts"
    return Curves(
        remark=f"{said}; {ablation} ablation; {int(stored.attrs['universe'])} units in all",
        curves=tuple(
            Curve(str(name), sizes, row, aside=str(name) == "random")
            for name, row in zip(found["component"].values, rows, strict=True)
        ),
        x="proportion of all units in the circuit",
        meaning="faithfulness (0: empty circuit, 1: whole model)",
        levels=(0.0, 1.0),
        log_x=True,
    )


def _numbers(values: xr.DataArray) -> np.ndarray:
    return np.asarray(values.values, dtype=np.float64)


def _labels(dataset: xr.Dataset, dim: str) -> tuple[str, ...]:
    return tuple(str(label) for label in dataset[dim].values)
