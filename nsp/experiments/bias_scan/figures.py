"""Figures of a bias scan: pair gaps, divergence by layer, star layers and single neurons."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import xarray as xr

from nsp.experiments.alignment_scan.figures import neuron_figures
from nsp.experiments.bias_scan.tables import ScanResult, neuron_stats
from nsp.report.default_figures import figures_by_dims
from nsp.report.figures import Bars, Distribution, Figure, Scatter, Series, View, figure
from nsp.report.labels import short
from nsp.report.series import between_layers

_NEURONS = 600
_MEANING = "gap: log P(more stereotyping) less log P(less stereotyping)"


def figures(tree: xr.DataTree) -> list[Figure]:
    """Every figure that the scan has data for."""
    scan = ScanResult(tree)
    views = [View(make=partial(_gaps, scan), name="by type"), View(make=partial(_each_pair, scan), name="each pair")]
    found = [figure("pair-gaps", "pair gaps", *views)]
    found += figures_by_dims(tree, [f"effects/{component}" for component in tree.attrs["recipe_resolved"]["components"]])
    if scan.components:
        found.append(figure("stars", "star layers", partial(_stars, scan)))
    if scan.neurons is not None:
        found.append(figure("neurons", "single neurons", partial(_neurons, scan)))
    return found + (neuron_figures(scan.alignment) if scan.alignment is not None else [])


def _runs(scan: ScanResult) -> dict[str, np.ndarray]:
    """Each model's gaps, a pair each: the more stereotyping sentence's log-probability less the other's."""
    series = {"aligned": scan.baseline["logprob_aligned"], "base": scan.baseline["logprob_base"]}
    if scan.ablation is not None:
        series["base, found neurons ablated"] = scan.ablation["logprob"]
    more, less = (np.array(side, dtype=int) for side in zip(*scan.pairs, strict=True))
    values = {name: np.asarray(part.values, dtype=np.float64) for name, part in series.items()}
    return {name: part[more] - part[less] for name, part in values.items()}


def _pair_names(scan: ScanResult) -> np.ndarray:
    kinds = scan.inputs["bias_type"].values
    if "text" not in scan.inputs:
        return np.array([str(kinds[more]) for more, _ in scan.pairs], dtype=object)
    texts = [short(str(text), 90) for text in scan.inputs["text"].values]
    return np.array([f"{kinds[more]}: “{texts[more]}” over “{texts[less]}”" for more, less in scan.pairs], dtype=object)


def _finding(gaps: dict[str, np.ndarray]) -> str:
    share = 100 * float(np.mean(gaps["base"] > 0))
    return f"pair gaps: the base model prefers the more stereotyping sentence in {share:.0f} % of {len(gaps['base'])} pairs"


def _gaps(scan: ScanResult) -> Distribution:
    """Pair gaps by type of bias: how much likelier the stereotyping sentence is, in each model."""
    gaps, names = _runs(scan), _pair_names(scan)
    kinds = np.array([str(scan.inputs["bias_type"].values[more]) for more, _ in scan.pairs])
    groups = ["all", *scan.bias_types] if len(scan.bias_types) > 1 else list(scan.bias_types)
    members = [np.full(len(kinds), True) if kind == "all" and len(groups) > 1 else kinds == kind for kind in groups]
    left = int(sum((~np.isfinite(gap)).sum() for gap in gaps.values()))
    unfinished = f"; {left} not computed" if left else ""
    return Distribution(
        remark=f"boxes: quartiles and median, whiskers 5 to 95 %, a point for each pair{unfinished}",
        groups=tuple(f"{kind}  (n = {int(those.sum())})" for kind, those in zip(groups, members, strict=True)),
        series=tuple(gaps),
        values=tuple(tuple(gap[those] for those in members) for gap in gaps.values()),
        notes=tuple(tuple(tuple(names[those]) for those in members) for _ in gaps),
        y="type of bias (n pairs)",
        meaning=_MEANING,
        units="nats",
        finding=_finding(gaps),
    )


def _each_pair(scan: ScanResult) -> Scatter:
    """Each pair's gap, in the order of the aligned model's."""
    gaps = _runs(scan)
    order = np.argsort(gaps["aligned"], kind="stable")
    names, x = tuple(_pair_names(scan)[order]), np.arange(len(order), dtype=float)
    series = tuple(Series(name=name, x=x, y=gap[order], notes=names) for name, gap in gaps.items())
    axis = "pair, in the order of the aligned model's gaps"
    return Scatter(series=series, x=axis, y="gap", meaning=f"{_MEANING}; above 0 it is preferred", units="nats", whole=True, levels=(0.0,))


def _stars(scan: ScanResult) -> Bars:
    layers = scan.scan(scan.components[0])["layer"].values.tolist()
    series = []
    for component in scan.components:
        counts = Counter(star.layer for star in scan.stars[component])
        removed = np.nanmean(scan.removed(component), axis=0)
        notes = tuple(f"layer {layer}, removes {part:.3g} nats on average" for layer, part in zip(layers, removed, strict=True))
        y = np.array([float(counts[layer]) for layer in layers])
        series.append(Series(name=component, x=np.arange(len(layers), dtype=float), y=y, notes=notes))
    meaning = f"prompts, of {len(scan.baseline['kl'])}, whose divergence the layer removes most of"
    return Bars(
        series=tuple(series), ticks=tuple(map(str, layers)), x="layer", y="prompts", meaning=meaning, units="prompts", finding=""
    )


def _neurons(scan: ScanResult) -> Scatter:
    rows = [row for row in neuron_stats(scan).rows if row[5] != 0][:_NEURONS]
    wide = max((int(row[2]) for row in rows), default=1) + 1
    known = {(layer, neuron) for layer, neuron, _ in scan.found()}
    parts = {
        "found": [row for row in rows if (row[1], row[2]) in known],
        "others": [row for row in rows if (row[1], row[2]) not in known],
    }
    series = [
        Series(
            name=name,
            x=between_layers(np.array([row[1] for row in part]), np.array([row[2] for row in part]), wide),
            y=np.array([row[5] for row in part], dtype=float),
            notes=tuple(f"layer {row[1]}, neuron {row[2]}, on {row[3]} prompts" for row in part),
        )
        for name, part in parts.items()
        if part
    ]
    meaning = "divergence that the neuron removes, summed over prompts and divided by all of them; the largest"
    return Scatter(series=tuple(series), x="layer", y="removed", meaning=meaning, units="nats", whole=True)
