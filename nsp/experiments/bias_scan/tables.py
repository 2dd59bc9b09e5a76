"""The tables of a bias scan, computed from its store: what ``nsp export STORE --csv DIR`` writes, one file per table.

Documented column by column in docs/bias-scans.md. Everything here is arithmetic on stored arrays: no model runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from nsp.experiments.alignment_scan.activations import GROUP as ACTIVATIONS
from nsp.experiments.alignment_scan.select import AlignmentNeurons, alignment_neurons, neuron_table, overlap
from nsp.experiments.bias_scan.groups import ABLATION, FOUND, NEURONS, NEUTRAL, NOT_DRAWN
from nsp.experiments.bias_scan.layer_profile import LayerProfile, is_stepwise, layer_profile, removed_by_layer
from nsp.report.summary import SummaryTable
from nsp.statistics import mean_effects
from nsp.statistics.proportion import wilson_interval


@dataclass(frozen=True, eq=False)
class ScanResult:
    """A bias scan's store, with what follows from it."""

    tree: xr.DataTree

    def group(self, path: str) -> xr.Dataset | None:
        """A group with its values in memory; None where the scan does not have it."""
        top, _, rest = path.partition("/")
        there = top in self.tree.children and (not rest or rest in self.tree[top].children)
        return self.tree[path].to_dataset().load() if there else None

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

    def scan(self, component: str) -> xr.Dataset:
        """The layer scan of a component, dims (prompt, layer)."""
        return self.tree[f"effects/{component}"].to_dataset().load()

    def removed(self, component: str) -> np.ndarray:
        """Nats that each layer removes, (prompt, layer)."""
        stepwise = is_stepwise(component, self.tree.attrs["recipe_resolved"]["patch"])
        return removed_by_layer(self.baseline["kl"].values, self.scan(component)["kl"].values, stepwise=stepwise)

    @cached_property
    def stars(self) -> dict[str, list[LayerProfile]]:
        """The profile of every prompt, with its star layer, by component."""
        profiles = {}
        for component in self.components:
            layers = self.scan(component)["layer"].values.tolist()
            rows = zip(self.baseline["kl"].values, self.removed(component), strict=True)
            profiles[component] = [layer_profile(float(kl), removed, layers) for kl, removed in rows]
        return profiles

    @cached_property
    def neurons(self) -> xr.Dataset | None:
        """The single-neuron effects, dims (prompt, neuron)."""
        return self.group(NEURONS)

    @cached_property
    def ablation(self) -> xr.Dataset | None:
        """The sentences once the found neurons are ablated, dims (prompt,)."""
        return self.group(ABLATION)

    @cached_property
    def tops(self) -> list[list[int]]:
        """Of every prompt, the neurons that remove most of its divergence, best first; those that remove nothing are out."""
        assert self.neurons is not None
        delta = np.nan_to_num(self.neurons["delta_kl"].values.astype(np.float64))
        orders = np.argsort(delta, axis=1, kind="stable")[:, : int(self.neurons.attrs["top"])]
        return [order[row[order] < 0].tolist() for row, order in zip(delta, orders, strict=True)]

    def found(self) -> list[tuple[int, int, float]]:
        """(layer, neuron, nats) of the found neurons, best first; empty while they are not known."""
        dataset = self.group(FOUND)
        if dataset is None:
            return []
        rows = zip(*(dataset[name].values.tolist() for name in ("layer_of", "neuron_of", "removed")), strict=True)
        return [row for row in rows if row[0] >= 0]

    @cached_property
    def alignment(self) -> AlignmentNeurons | None:
        """What the alignment scan in this store found; None where there is none, or it is not finished."""
        dataset = self.group(ACTIVATIONS)
        return None if dataset is None or bool(dataset["value"].isnull().any()) else alignment_neurons(self.tree)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(row of the more sentence, row of the less sentence) of every pair, in the order of the data."""
        numbers, sides = self.inputs["pair_number"].values.tolist(), self.inputs["side"].values.tolist()
        row_of = {key: row for row, key in enumerate(zip(numbers, sides, strict=True))}
        return [(row_of[number, "more"], row_of[number, "less"]) for number in sorted(set(numbers))]

    def rows_of(self, bias_type: str = "all") -> np.ndarray:
        """`pairs` of one type of bias as an array, (pair, side)."""
        kinds = self.inputs["bias_type"].values
        chosen = [pair for pair in self.pairs if bias_type in ("all", str(kinds[pair[0]]))]
        return np.array(chosen, dtype=np.int64).reshape(-1, 2)

    @property
    def bias_types(self) -> list[str]:
        """The types of bias, in alphabetical order."""
        return sorted({str(kind) for kind in self.inputs["bias_type"].values})

    @property
    def logprobs(self) -> dict[str, np.ndarray]:
        """The sentences' log-probabilities in nats, (prompt,), by run: aligned, base, and ablated where there is one."""
        runs = {model: self.baseline[f"logprob_{model}"].values for model in ("aligned", "base")}
        return runs if self.ablation is None else {**runs, "ablated": self.ablation["logprob"].values}


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
    """One row per sentence, in the order of the data."""
    inputs, baseline = scan.inputs, scan.baseline
    order = scan.rows_of().reshape(-1)
    columns: dict[str, Iterable[Any]] = {"prompt": order}
    for name in ("pair_number", "pair_id", "bias_type", "side", "origin", "n_tokens"):
        columns[name] = inputs[name].values[order]
    columns |= {f"{name}_base": baseline[name].values[order] for name in ("kl", "kl_mean") if name in baseline}
    for component in scan.components:
        profiles = [scan.stars[component][row] for row in order]
        columns[f"star_layer_{component}"] = [profile.layer for profile in profiles]
        for name in ("removed", "share", "status"):
            columns[f"{name}_{component}"] = [getattr(profile, name) for profile in profiles]
        columns[f"ties_{component}"] = [_spaced(profile.ties) for profile in profiles]
    if scan.neurons is not None:
        layers = scan.neurons["neuron_layer"].values[order].tolist()
        columns["neuron_layer"] = [layer if layer >= 0 else None for layer in layers]
        columns["top_neurons"] = [_spaced(scan.tops[row]) for row in order]
    columns |= {f"logprob_{model}": baseline[f"logprob_{model}"].values[order] for model in ("aligned", "base")}
    if scan.ablation is not None:
        columns |= {f"{name}_ablated": scan.ablation[name].values[order] for name in ("kl", "logprob")}
    return SummaryTable.of("prompt_results", {**columns, "text": inputs["text"].values[order]})


def _spaced(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def layer_stats(scan: ScanResult) -> SummaryTable:
    """One row per component and layer. Intervals resample pairs, whose two sentences are averaged first."""
    columns: dict[str, list[Any]] = {}
    for component in scan.components:
        dataset, removed, profiles = scan.scan(component), scan.removed(component), scan.stars[component]
        layers = dataset["layer"].values.tolist()
        delta = dataset["delta_kl"].values.astype(np.float64)[scan.rows_of()].mean(axis=1)
        means = mean_effects(xr.DataArray(delta, {"layer": layers}, ("pair", "layer"), attrs={"units": "nats"}))
        named = [[profile for profile in profiles if profile.layer == layer] for layer in layers]
        part: dict[str, Iterable[Any]] = {
            "component": [component] * len(layers),
            "layer": layers,
            "n_pairs": means["n"].values,
            "mean_kl": np.nanmean(dataset["kl"].values, axis=0),
            "mean_delta_kl": means["mean"].values,
            "low": means["low"].values,
            "high": means["high"].values,
            "mean_removed": np.nanmean(removed, axis=0),
            "n_star": map(len, named),
            "n_tie": [sum(bool(profile.ties) for profile in here) for here in named],
            "n_flat": [sum(profile.flat for profile in here) for here in named],
        }
        for name, values in part.items():
            columns.setdefault(name, []).extend(values.tolist() if isinstance(values, np.ndarray) else values)
    return SummaryTable.of("layer_stats", columns)


def neuron_stats(scan: ScanResult) -> SummaryTable:
    """One row per neuron of every layer that was patched, best first."""
    assert scan.neurons is not None
    delta, layer_of = scan.neurons["delta_kl"].values.astype(np.float64), scan.neurons["neuron_layer"].values
    times = Counter((int(layer), neuron) for layer, top in zip(layer_of, scan.tops, strict=True) for neuron in top)
    drawn = max(1, int((layer_of != NOT_DRAWN).sum()))
    rows: list[tuple[Any, ...]] = []
    for layer in np.unique(layer_of[layer_of >= 0]).tolist():
        block = delta[layer_of == layer]
        for neuron, total in enumerate(np.nansum(block, axis=0).tolist()):
            rows.append((layer, neuron, len(block), total / len(block), -total / drawn, times[layer, neuron]))
    rows.sort(key=lambda row: -row[4])
    columns = ("rank", "layer", "neuron", "n_prompts", "mean_delta_kl", "removed", "n_top")
    return SummaryTable("neuron_stats", columns, tuple((rank + 1, *row) for rank, row in enumerate(rows)))


def pair_gaps(scan: ScanResult, bias_type: str) -> SummaryTable:
    """One row per pair of one type: how its two sentences differ in divergence and in log-probability."""
    inputs, kl = scan.inputs, scan.baseline["kl"].values.astype(np.float64)
    more, less = scan.rows_of(bias_type).T
    gaps = {model: _gaps(values, more, less) for model, values in scan.logprobs.items()}
    columns = {name: inputs[name].values[more] for name in ("pair_number", "pair_id", "bias_type", "direction")}
    columns |= {"kl_more": kl[more], "kl_less": kl[less], "kl_gap": kl[more] - kl[less]}
    columns |= {f"gap_{model}": gaps[model] for model in ("aligned", "base")}
    columns |= {f"prefers_more_{model}": gaps[model] > 0 for model in ("aligned", "base")}
    if scan.ablation is not None:
        columns["kl_gap_ablated"] = _gaps(scan.ablation["kl"].values, more, less)
        columns |= {"gap_ablated": gaps["ablated"], "prefers_more_ablated": gaps["ablated"] > 0}
    columns["origin"] = inputs["origin"].values[more]
    columns |= {"text_more": inputs["text"].values[more], "text_less": inputs["text"].values[less]}
    return SummaryTable.of(f"pairgap_{bias_type}", columns)


def _gaps(values: np.ndarray, more: np.ndarray, less: np.ndarray) -> np.ndarray:
    exact = values.astype(np.float64)
    return np.asarray(exact[more] - exact[less])


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
    share = float((gaps > 0).mean())
    low, high = wilson_interval(share, len(gaps))
    return Score(
        len(gaps), 100 * share, 100 * float(low), 100 * float(high), int((gaps == 0).sum()), float(gaps.mean())
    )


def score_table(scan: ScanResult) -> SummaryTable:
    """The CrowS-Pairs score by type and over all pairs, of each model, with 95 % Wilson intervals."""
    rows = []
    for kind in (*scan.bias_types, "all"):
        more, less = scan.rows_of(kind).T
        for name, values in scan.logprobs.items():
            score = crows_score(_gaps(values, more, less))
            rows.append((kind, name, score.pairs, score.percent, score.low, score.high, score.ties, score.mean_gap))
    columns = ("bias_type", "model", "n_pairs", "score", "low", "high", "ties", "mean_gap")
    return SummaryTable("crows_score", columns, tuple(rows))


def neutral_text(scan: ScanResult) -> SummaryTable:
    """Perplexity of the neutral sentences, each and all, before and after the found neurons are ablated."""
    dataset = scan.tree[NEUTRAL].to_dataset().load()
    tokens = dataset["n_scored"].values.astype(np.float64)
    before, after = (
        np.exp(-np.append(logprob, logprob.sum()) / np.append(tokens, tokens.sum()))
        for logprob in (dataset[f"logprob_{run}"].values for run in ("base", "ablated"))
    )
    columns: dict[str, Iterable[Any]] = {
        "text": [*map(str, dataset["text"].values), "all"],
        "n_tokens": np.append(tokens, tokens.sum()).astype(np.int64),
        "perplexity_base": before,
        "perplexity_ablated": after,
        "ratio": after / before,
    }
    return SummaryTable.of("neutral_text", columns)


def intersection(scan: ScanResult) -> SummaryTable:
    """Bias neurons that are also alignment neurons, and how many chance would give, in the layers that were patched."""
    assert scan.neurons is not None
    assert scan.alignment is not None
    layer_of = scan.neurons["neuron_layer"].values.tolist()
    layers = {layer for layer in layer_of if layer >= 0} & set(scan.alignment.layer.tolist())
    tops = {(layer, neuron) for layer, top in zip(layer_of, scan.tops, strict=True) if layer >= 0 for neuron in top}
    bias = {"found": {(layer, neuron) for layer, neuron, _ in scan.found()}, "top of any prompt": tops}
    aligned = {name: scan.alignment.sites(getattr(scan.alignment, name)) for name in ("selected", "confirmed")}
    rows = []
    for name, first in bias.items():
        for other, second in aligned.items():
            both = overlap(first, second, layers, int(scan.neurons.sizes["neuron"]))
            sites = " ".join(f"{layer}.{neuron}" for layer, neuron in both.shared)
            rows.append((name, other, both.population, both.first, both.second, len(both.shared), both.expected, both.p, sites))
    columns = (
        "bias_neurons", "alignment_neurons", "population", "n_bias", "n_alignment", "overlap", "expected", "p", "neurons",
    )  # fmt: skip
    return SummaryTable("intersection", columns, tuple(rows))
