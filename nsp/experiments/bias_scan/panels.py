"""What the report of a bias scan draws: divergence by layer, star layers, pair gaps and single neurons."""

from __future__ import annotations

from collections import Counter

import numpy as np
import xarray as xr

from nsp.experiments.alignment_scan.panels import alignment_panels
from nsp.experiments.bias_scan.tables import ScanResult, neuron_stats
from nsp.report.panels import Drawing, Series, View, chart, numbers, panels_of, short

_NEURONS = 600


def panels(tree: xr.DataTree) -> list[Drawing]:
    """Every drawing that the scan has data for."""
    scan = ScanResult(tree)
    drawn = panels_of(tree, [f"effects/{component}" for component in scan.components])
    if scan.components:
        drawn.append(_stars(scan))
    drawn.append(_gaps(scan))
    if scan.neurons is not None:
        drawn.append(_neurons(scan))
    if scan.alignment is not None:
        drawn += alignment_panels(scan.alignment)
    return drawn


def _stars(scan: ScanResult) -> Drawing:
    series = []
    for component in scan.components:
        layers = scan.scan(component)["layer"].values.tolist()
        counts = Counter(star.layer for star in scan.stars[component])
        removed = np.nanmean(scan.removed(component), axis=0)
        labels = [
            f"layer {layer}, removes {part:.3g} nats on average" for layer, part in zip(layers, removed, strict=True)
        ]
        series.append(
            Series(
                component,
                [float(layer) for layer in layers],
                [float(counts[layer]) for layer in layers],
                labels=labels,
                form="bars",
            )
        )
    return chart(
        "star layers",
        f"prompts, of {len(scan.baseline['kl'])}, whose divergence the layer removes most of",
        "prompts",
        "prompts",
        "layer",
        [View("", series)],
        finding="",
    )


def _gaps(scan: ScanResult) -> Drawing:
    """Each pair's gap, in the order of the aligned model's."""
    runs = {model: np.asarray(scan.baseline[f"logprob_{model}"].values) for model in ("aligned", "base")}
    if scan.ablation is not None:
        runs["base, found neurons ablated"] = np.asarray(scan.ablation["logprob"].values)
    gaps = {name: np.array([values[more] - values[less] for more, less in scan.pairs]) for name, values in runs.items()}
    order = np.argsort(gaps["aligned"], kind="stable")
    kinds, texts = scan.inputs["bias_type"].values, scan.inputs["text"].values
    labels = [
        f"{kinds[scan.pairs[at][0]]}: “{short(str(texts[scan.pairs[at][0]]), 90)}” over “{short(str(texts[scan.pairs[at][1]]), 90)}”"
        for at in order
    ]
    series = [
        Series(
            name, [float(place) for place in range(len(order))], numbers(values[order]), labels=labels, form="points"
        )
        for name, values in gaps.items()
    ]
    views = [
        View("each pair", series),
        View("distribution", [_distribution(name, values) for name, values in gaps.items()]),
    ]
    share = 100 * float(np.mean(gaps["base"] > 0))
    return chart(
        "pair gaps",
        "log-probability of the more stereotyping sentence less that of the other; above 0 it is preferred",
        "nats",
        "gap",
        "pair, in the order of the aligned model's gaps",
        views,
        finding=f"pair gaps: the base model prefers the more stereotyping sentence in {share:.0f} % of {len(order)} pairs",
        whole=True,
    )


def _distribution(name: str, gaps: np.ndarray) -> Series:
    """The gaps in order: x is the share of pairs with a smaller gap."""
    ordered = np.sort(gaps)
    share = (np.arange(len(ordered)) + 0.5) / len(ordered) * (len(ordered) - 1)
    return Series(
        name,
        _places(share),
        numbers(ordered),
        labels=[f"{100 * (at + 0.5) / len(ordered):.0f} % of pairs" for at in range(len(ordered))],
    )


def _places(values: np.ndarray) -> list[float]:
    """Places along x."""
    return [float(f"{value:.5g}") for value in values]


def _neurons(scan: ScanResult) -> Drawing:
    rows = [row for row in neuron_stats(scan).rows if row[5] != 0][:_NEURONS]
    wide = max((int(row[2]) for row in rows), default=1) or 1
    found = {(layer, neuron) for layer, neuron, _ in scan.found()}
    parts = {
        "found": [row for row in rows if (row[1], row[2]) in found],
        "others": [row for row in rows if (row[1], row[2]) not in found],
    }
    series = [
        Series(
            name, [float(f"{row[1] + 0.8 * (row[2] / wide - 0.5):.5g}") for row in part], numbers([row[5] for row in part]),
            labels=[f"layer {row[1]}, neuron {row[2]}, on {row[3]} prompts" for row in part], form="points",
        )
        for name, part in parts.items() if part
    ]  # fmt: skip
    return chart(
        "single neurons",
        "divergence that the neuron removes, summed over prompts and divided by all of them; the largest",
        "nats",
        "removed",
        "layer",
        [View("", series)],
    )
