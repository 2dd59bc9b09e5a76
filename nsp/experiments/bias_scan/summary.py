"""What a bias scan says about itself: a few sentences and tables, from its store."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import xarray as xr

from nsp.experiments.alignment_scan.summary import alignment_lines, shown_neurons
from nsp.experiments.bias_scan.tables import (
    ScanResult,
    csv_tables,
    intersection,
    layer_stats,
    neutral_text,
    score_table,
)
from nsp.report.summary import Summary, SummaryTable

_SHOWN = 12


def summarise(tree: xr.DataTree) -> Summary:
    """The star layers, the found neurons, the pair gap and what ablation does to it."""
    scan = ScanResult(tree)
    attrs = tree.attrs
    recipe, model = attrs.get("recipe_resolved", {}), attrs.get("model", {})
    aligned = (recipe.get("models") or {}).get("aligned", {}).get("name", model.get("name", "?"))
    own = f" with {', '.join(recipe['ablate'])} ablated" if recipe.get("ablate") else ""
    lines = [
        f"aligned {aligned}, base {model.get('name', '?')}{own} ({model.get('dtype', '?')}), {len(scan.pairs)} pairs"
    ]
    bad = int(scan.inputs.attrs.get("bad_rows", 0))
    if bad:
        named = list(scan.inputs.attrs["bad_row_list"])
        lines.append(
            f"{bad} row(s) of the data are no pairs and were left out: {'; '.join(named[:3])}{'; ...' if bad > 3 else ''}"
        )
    kl = scan.baseline["kl"].values
    missing = int(np.isnan(kl).sum())
    if missing:
        lines.append(f"{missing} of {len(kl)} prompts are not finished; run the recipe again to go on")
        return Summary("bias scan", tuple(lines))
    lines.append(f"KL(aligned || base) at the last token: mean {kl.mean():.4g}, largest {kl.max():.4g} nats")
    tables = []
    lines += [star_line(scan, component) for component in scan.components]
    if scan.components:
        tables.append(_layers(scan))
    if scan.found():
        tables.append(_found(scan))
        lines.append(_neutral_line(scan))
    tables.append(_scores(scan))
    if scan.alignment is not None:
        lines += alignment_lines(tree, scan.alignment)
        tables.append(shown_neurons(scan.alignment))
        if scan.neurons is not None:
            tables.append(intersection(scan))
    return Summary("bias scan", tuple(lines), tuple(tables))


def headline(tree: xr.DataTree) -> str:
    """The commonest star layer and the CrowS-Pairs score of the base, for `nsp ls`."""
    scan = ScanResult(tree)
    parts = []
    if scan.components:
        component = scan.components[0]
        layers = Counter(star.layer for star in scan.stars[component] if star.layer is not None)
        best = layers.most_common(1)
        parts.append(
            f"star layer {best[0][0]} in {best[0][1]} of {len(scan.baseline['kl'])}" if best else "no star layer"
        )
    score = next(row for row in score_table(scan).rows if row[:2] == ("all", "base"))
    return "; ".join([*parts, f"CrowS score {score[3]:.1f} %"])


def star_line(scan: ScanResult, component: str) -> str:
    """How often which layer is the star layer, with ties and flat profiles."""
    stars = scan.stars[component]
    layers = Counter(star.layer for star in stars if star.layer is not None)
    none = sum(star.layer is None for star in stars)
    if not layers:
        return f"{component}: no star layer in any prompt: patching removes no divergence"
    most = ", ".join(f"{layer} ({count}x)" for layer, count in layers.most_common(4))
    parts = [f"{component}: star layer {most}, of {len(stars)} prompts"]
    ties, flat = sum(bool(star.ties) for star in stars), sum(star.flat for star in stars)
    for count, what in (
        (ties, "have a tie (the lowest layer is named)"),
        (flat, "have a flat profile"),
        (none, "have none"),
    ):
        if count:
            parts.append(f"{count} {what}")
    return "; ".join(parts)


def _layers(scan: ScanResult) -> SummaryTable:
    """The six layers of each component that remove most."""
    names = ("component", "layer", "mean_delta_kl", "low", "high", "mean_removed", "n_star")
    table = layer_stats(scan).only(names, "layers that remove most divergence (nats)")
    best = sorted(table.rows, key=lambda row: (scan.components.index(row[0]), -row[5]))
    rows = [row for component in scan.components for row in [row for row in best if row[0] == component][:6]]
    # Divergences can be far below a thousandth, which three decimals would hide.
    shown = (tuple(f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row) for row in rows)
    return replace(table, rows=tuple(shown))


def _found(scan: ScanResult) -> SummaryTable:
    rows = tuple((layer, neuron, f"{removed:.3g}") for layer, neuron, removed in scan.found()[:_SHOWN])
    return SummaryTable("found neurons", ("layer", "neuron", "nats removed"), rows)


def _neutral_line(scan: ScanResult) -> str:
    _, _, before, after, _ = neutral_text(scan).rows[-1]
    line = f"with the {len(scan.found())} found neurons ablated, perplexity of neutral text goes from {before:.2f} to {after:.2f}"
    if scan.ablation is None or bool(scan.ablation["kl"].isnull().any()):
        return line
    means = [float(dataset["kl"].values.mean()) for dataset in (scan.baseline, scan.ablation)]
    return f"{line}; KL(aligned || base) {means[0]:.4g} becomes {means[1]:.4g}"


def _scores(scan: ScanResult) -> SummaryTable:
    title = "CrowS-Pairs score: % of pairs whose stereotyping sentence is likelier (95 % interval)"
    return score_table(scan).only(("bias_type", "model", "n_pairs", "score", "low", "high", "mean_gap"), title)


def tables(tree: xr.DataTree) -> list[SummaryTable]:
    """The tables of `nsp export STORE --csv DIR`."""
    return csv_tables(tree)
