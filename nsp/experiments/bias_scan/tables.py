"""The tables of a bias scan, computed from its store: what ``nsp export STORE --csv DIR`` writes, one file a table.

Documented column by column in docs/bias-scans.md. Everything here is arithmetic on stored arrays: no model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from nsp.experiments.alignment_scan.job import alignment_neurons
from nsp.experiments.alignment_scan.select import AlignmentNeurons, neuron_table, overlap
from nsp.experiments.bias_scan.star import Star, removed_by_layer, star_of, steps
from nsp.report.summary import SummaryTable
from nsp.statistics import mean_effects
from nsp.statistics.proportion import wilson_interval

_NEURON_GROUP = "effects/mlp_neurons"
# What `neuron_layer` holds instead of a layer.
NOT_COMPUTED, NO_STAR, NOT_DRAWN = -1, -2, -3


@dataclass(frozen=True, eq=False)
class ScanResult:
    """A bias scan's store, with what follows from it."""

    tree: xr.DataTree

    @cached_property
    def inputs(self) -> xr.Dataset:
        return self.tree["inputs"].to_dataset().load()

    @cached_property
    def baseline(self) -> xr.Dataset:
        return self.tree["baseline"].to_dataset().load()

    @property
    def components(self) -> tuple[str, ...]:
        """The scanned components, in the recipe's order."""
        return tuple(self.tree.attrs["recipe_resolved"]["components"])

    @property
    def patch(self) -> str:
        return str(self.tree.attrs["recipe_resolved"]["patch"])

    def scan(self, component: str) -> xr.Dataset:
        """The layer scan of a component, dims (prompt, layer)."""
        return self.tree[f"effects/{component}"].to_dataset().load()

    def removed(self, component: str) -> np.ndarray:
        """Nats that each layer removes, (prompt, layer)."""
        kl = np.asarray(self.scan(component)["kl"].values)
        return removed_by_layer(np.asarray(self.baseline["kl"].values), kl, stepwise=steps(component, self.patch))

    @cached_property
    def stars(self) -> dict[str, list[Star]]:
        """The star layer of every prompt, by component."""
        found = {}
        for component in self.components:
            layers = self.scan(component)["layer"].values.tolist()
            base = self.baseline["kl"].values
            found[component] = [
                star_of(float(kl), row, layers) for kl, row in zip(base, self.removed(component), strict=True)
            ]
        return found

    @cached_property
    def neurons(self) -> xr.Dataset | None:
        """The single-neuron effects, dims (prompt, neuron)."""
        return self.tree[_NEURON_GROUP].to_dataset().load() if has_group(self.tree, _NEURON_GROUP) else None

    @cached_property
    def ablation(self) -> xr.Dataset | None:
        return self.tree["effects/ablation"].to_dataset().load() if has_group(self.tree, "effects/ablation") else None

    @property
    def top(self) -> int:
        return 0 if self.neurons is None else int(self.neurons.attrs["top"])

    def top_neurons(self, row: int) -> list[int]:
        """The neurons that remove most from one prompt's divergence, best first; those that remove nothing are out."""
        assert self.neurons is not None
        delta = np.asarray(self.neurons["delta_kl"].values[row], dtype=np.float64)
        delta = np.where(np.isnan(delta), 0.0, delta)
        order = np.argsort(delta, kind="stable")[: self.top]
        return [int(neuron) for neuron in order if delta[neuron] < 0]

    def found(self) -> list[tuple[int, int, float]]:
        """(layer, neuron, nats) of the found neurons, best first; empty while they are not known."""
        if not has_group(self.tree, "circuit/found"):
            return []
        dataset = self.tree["circuit/found"].to_dataset().load()
        rows = zip(dataset["layer_of"].values, dataset["neuron_of"].values, dataset["removed"].values, strict=True)
        return [(int(layer), int(neuron), float(removed)) for layer, neuron, removed in rows if layer >= 0]

    @cached_property
    def alignment(self) -> AlignmentNeurons | None:
        """What the alignment scan in this store found; None where there is none, or it is not finished."""
        group = "activations/mlp_neurons"
        if not has_group(self.tree, group) or bool(self.tree[group]["value"].isnull().any()):
            return None
        return alignment_neurons(self.tree)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(row of the more sentence, row of the less sentence) of every pair, in the order of the data."""
        at: dict[int, dict[str, int]] = {}
        for row, (number, side) in enumerate(
            zip(self.inputs["pair_number"].values, self.inputs["side"].values, strict=True)
        ):
            at.setdefault(int(number), {})[str(side)] = row
        return [(at[number]["more"], at[number]["less"]) for number in sorted(at)]

    @property
    def bias_types(self) -> list[str]:
        """The types of bias, in alphabetical order."""
        return sorted({str(kind) for kind in self.inputs["bias_type"].values})


def has_group(tree: xr.DataTree, path: str) -> bool:
    """Whether a run has a group such as ``effects/mlp_neurons``."""
    top, _, rest = path.partition("/")
    return top in tree.children and rest in tree[top].children


def csv_tables(tree: xr.DataTree) -> list[SummaryTable]:
    """Every table of a scan; those of parts that the scan did not have are left out."""
    scan = ScanResult(tree)
    tables = [prompt_results(scan), score_table(scan)]
    tables += [pair_gaps(scan, kind) for kind in scan.bias_types]
    if scan.components:
        tables.append(layer_stats(scan))
    if scan.neurons is not None:
        tables += [neuron_stats(scan), neutral_text(scan)]
    if scan.alignment is not None:
        tables.append(neuron_table(scan.alignment))
        if scan.neurons is not None:
            tables.append(intersection(scan))
    return tables


def prompt_results(scan: ScanResult) -> SummaryTable:
    """One row a sentence, in the order of the data."""
    inputs, baseline = scan.inputs, scan.baseline
    columns = ["prompt", "pair_number", "pair_id", "bias_type", "side", "origin", "n_tokens", "kl_base"]
    columns += ["kl_mean_base"] if "kl_mean" in baseline else []
    for component in scan.components:
        columns += [f"{name}_{component}" for name in ("star_layer", "removed", "share", "status", "ties")]
    columns += ["neuron_layer", "top_neurons"] if scan.neurons is not None else []
    columns += ["logprob_aligned", "logprob_base"]
    columns += ["kl_ablated", "logprob_ablated"] if scan.ablation is not None else []
    columns.append("text")
    rows = []
    for row in (row for pair in scan.pairs for row in pair):
        cells: list[Any] = [row, int(inputs["pair_number"][row])]
        cells += [str(inputs[name].values[row]) for name in ("pair_id", "bias_type", "side", "origin")]
        cells += [int(inputs["n_tokens"][row]), float(baseline["kl"][row])]
        cells += [float(baseline["kl_mean"][row])] if "kl_mean" in baseline else []
        for component in scan.components:
            star = scan.stars[component][row]
            cells += [star.layer, star.removed, star.share, star.status, " ".join(map(str, star.ties))]
        if scan.neurons is not None:
            layer = int(scan.neurons["neuron_layer"][row])
            cells += [layer if layer >= 0 else None, " ".join(map(str, scan.top_neurons(row)))]
        cells += [float(baseline[f"logprob_{model}"][row]) for model in ("aligned", "base")]
        if scan.ablation is not None:
            cells += [float(scan.ablation[name][row]) for name in ("kl", "logprob")]
        rows.append((*cells, str(inputs["text"].values[row])))
    return SummaryTable("prompt_results", tuple(columns), tuple(rows))


def layer_stats(scan: ScanResult) -> SummaryTable:
    """One row a component and layer. Intervals resample pairs, whose two sentences are averaged first."""
    columns = (
        "component",
        "layer",
        "n_pairs",
        "mean_kl",
        "mean_delta_kl",
        "low",
        "high",
        "mean_removed",
        "n_star",
        "n_tie",
        "n_flat",
    )
    rows = []
    for component in scan.components:
        dataset, removed = scan.scan(component), scan.removed(component)
        delta = np.asarray(dataset["delta_kl"].values, dtype=np.float64)
        by_pair = xr.DataArray(
            np.array([delta[list(pair)].mean(axis=0) for pair in scan.pairs]),
            {"layer": dataset["layer"].values},
            ("pair", "layer"),
            attrs={"units": "nats"},
        )
        means = mean_effects(by_pair)
        stars = scan.stars[component]
        for at, layer in enumerate(dataset["layer"].values.tolist()):
            here = [star for star in stars if star.layer == layer]
            rows.append(
                (
                    component, int(layer), int(means["n"][at]), float(np.nanmean(dataset["kl"].values[:, at])), float(means["mean"][at]),
                    float(means["low"][at]), float(means["high"][at]), float(np.nanmean(removed[:, at])), len(here),
                    sum(bool(star.ties) for star in here), sum(star.flat for star in here),
                )
            )  # fmt: skip
    return SummaryTable("layer_stats", columns, tuple(rows))


def neuron_stats(scan: ScanResult) -> SummaryTable:
    """One row a neuron of every layer that was patched, best first."""
    assert scan.neurons is not None
    delta = np.asarray(scan.neurons["delta_kl"].values, dtype=np.float64)
    at = np.asarray(scan.neurons["neuron_layer"].values)
    times: dict[tuple[int, int], int] = {}
    for row, layer in enumerate(at):
        for neuron in scan.top_neurons(row) if layer >= 0 else ():
            times[(int(layer), neuron)] = times.get((int(layer), neuron), 0) + 1
    rows: list[tuple[Any, ...]] = []
    drawn = max(1, int((at != NOT_DRAWN).sum()))
    for layer in sorted({int(layer) for layer in at if layer >= 0}):
        block = delta[at == layer]
        total = np.nansum(block, axis=0)
        for neuron in range(block.shape[1]):
            removed = float(-total[neuron] / drawn)
            rows.append(
                (layer, neuron, len(block), float(total[neuron] / len(block)), removed, times.get((layer, neuron), 0))
            )
    rows.sort(key=lambda row: -row[4])
    ranked = tuple((rank + 1, *row) for rank, row in enumerate(rows))
    return SummaryTable(
        "neuron_stats", ("rank", "layer", "neuron", "n_prompts", "mean_delta_kl", "removed", "n_top"), ranked
    )


def pair_gaps(scan: ScanResult, kind: str) -> SummaryTable:
    """One row a pair of one type: how its two sentences differ in divergence and in log-probability."""
    inputs, baseline = scan.inputs, scan.baseline
    columns = ["pair_number", "pair_id", "bias_type", "direction", "kl_more", "kl_less", "kl_gap"]
    columns += ["gap_aligned", "gap_base", "prefers_more_aligned", "prefers_more_base"]
    columns += ["kl_gap_ablated", "gap_ablated", "prefers_more_ablated"] if scan.ablation is not None else []
    columns += ["origin", "text_more", "text_less"]
    rows = []
    for more, less in scan.pairs:
        if str(inputs["bias_type"].values[more]) != kind:
            continue
        cells: list[Any] = [int(inputs["pair_number"][more])]
        cells += [str(inputs[name].values[more]) for name in ("pair_id", "bias_type", "direction")]
        kl = [float(baseline["kl"][row]) for row in (more, less)]
        gaps = [_gap(baseline[f"logprob_{model}"].values, more, less) for model in ("aligned", "base")]
        cells += [*kl, kl[0] - kl[1], *gaps, *(gap > 0 for gap in gaps)]
        if scan.ablation is not None:
            gap = _gap(scan.ablation["logprob"].values, more, less)
            cells += [_gap(scan.ablation["kl"].values, more, less), gap, gap > 0]
        rows.append(
            (*cells, str(inputs["origin"].values[more]), *(str(inputs["text"].values[row]) for row in (more, less)))
        )
    return SummaryTable(f"pairgap_{kind}", tuple(columns), tuple(rows))


def _gap(values: np.ndarray, more: int, less: int) -> float:
    return float(values[more]) - float(values[less])


@dataclass(frozen=True)
class Score:
    """The CrowS-Pairs score of some pairs: in percent, the share whose more stereotyping sentence is more likely.

    Attributes:
        low, high: the 95 % Wilson interval.
        ties: pairs whose sentences are equally likely; they do not count as a preference.
    """

    pairs: int
    percent: float
    low: float
    high: float
    ties: int
    mean_gap: float


def crows_score(gaps: np.ndarray) -> Score:
    """The score of log-probability gaps (more less less), axis (pair,); NaN where there are none or one is missing."""
    if len(gaps) == 0 or np.isnan(gaps).any():
        return Score(len(gaps), float("nan"), float("nan"), float("nan"), 0, float("nan"))
    preferring = int((gaps > 0).sum())
    low, high = wilson_interval(preferring / len(gaps), len(gaps))
    return Score(
        len(gaps),
        100 * preferring / len(gaps),
        100 * float(low),
        100 * float(high),
        int((gaps == 0).sum()),
        float(gaps.mean()),
    )


def score_table(scan: ScanResult) -> SummaryTable:
    """The CrowS-Pairs score by type and over all pairs, of each model, with 95 % Wilson intervals."""
    runs = {model: scan.baseline[f"logprob_{model}"].values for model in ("aligned", "base")}
    if scan.ablation is not None:
        runs["ablated"] = scan.ablation["logprob"].values
    rows = []
    kinds = [*scan.bias_types, "all"]
    for kind in kinds:
        chosen = [pair for pair in scan.pairs if kind in ("all", str(scan.inputs["bias_type"].values[pair[0]]))]
        for name, values in runs.items():
            score = crows_score(np.array([_gap(values, more, less) for more, less in chosen]))
            rows.append((kind, name, score.pairs, score.percent, score.low, score.high, score.ties, score.mean_gap))
    return SummaryTable(
        "crows_score", ("bias_type", "model", "n_pairs", "score", "low", "high", "ties", "mean_gap"), tuple(rows)
    )


def neutral_text(scan: ScanResult) -> SummaryTable:
    """Perplexity of the neutral sentences, each and all, before and after the found neurons are ablated."""
    dataset = scan.tree["effects/neutral"].to_dataset().load()
    tokens = np.asarray(dataset["n_scored"].values, dtype=np.float64)
    rows = []
    names = ("base", "ablated")
    for row, text in enumerate(dataset["text"].values):
        each = [float(np.exp(-dataset[f"logprob_{name}"].values[row] / tokens[row])) for name in names]
        rows.append((str(text), int(tokens[row]), *each, each[1] / each[0]))
    total = [float(np.exp(-dataset[f"logprob_{name}"].values.sum() / tokens.sum())) for name in names]
    rows.append(("all", int(tokens.sum()), *total, total[1] / total[0]))
    return SummaryTable(
        "neutral_text", ("text", "n_tokens", "perplexity_base", "perplexity_ablated", "ratio"), tuple(rows)
    )


def intersection(scan: ScanResult) -> SummaryTable:
    """Bias neurons that are also alignment neurons, and how many chance would give, in the layers that were patched."""
    assert scan.neurons is not None
    assert scan.alignment is not None
    at = np.asarray(scan.neurons["neuron_layer"].values)
    layers = {int(layer) for layer in at if layer >= 0} & {int(layer) for layer in scan.alignment.layer}
    tops = {(int(at[row]), neuron) for row in range(len(at)) if at[row] >= 0 for neuron in scan.top_neurons(row)}
    bias = {"found": {(layer, neuron) for layer, neuron, _ in scan.found()}, "top of any prompt": tops}
    aligned = {name: scan.alignment.sites(getattr(scan.alignment, name)) for name in ("selected", "confirmed")}
    rows = []
    for name, first in bias.items():
        for other, second in aligned.items():
            both = overlap(first, second, layers, int(scan.neurons.sizes["neuron"]))
            sites = " ".join(f"{layer}.{neuron}" for layer, neuron in both.shared)
            rows.append(
                (name, other, both.population, both.first, both.second, len(both.shared), both.expected, both.p, sites)
            )
    columns = (
        "bias_neurons",
        "alignment_neurons",
        "population",
        "n_bias",
        "n_alignment",
        "overlap",
        "expected",
        "p",
        "neurons",
    )
    return SummaryTable("intersection", columns, tuple(rows))
