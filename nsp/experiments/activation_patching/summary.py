"""The report of an activation-patching run, made from its store: what was run, what carries the effect, how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.experiments.activation_patching.recipe import StatisticsOptions
from nsp.experiments.activation_patching.statistics import Judgement, first_metric, judge
from nsp.report.summary import Summary, SummaryTable
from nsp.statistics import mean_effects

_TOP = 15
_LAYERS = 5
_NAMED = 5
_MODES = {
    "denoising": "clean into corrupt: is a site sufficient?",
    "noising": "corrupt into clean: is a site necessary?",
    "interchange": "each into the other",
}
_CORRECTIONS = {"max-t": "max-T", "bh": "Benjamini-Hochberg", "by": "Benjamini-Yekutieli", "none": "not corrected"}


def summarise(tree: xr.DataTree) -> Summary:
    """The report: mode, sites, baselines, total effect, significant sites, top layers, and tables of top effects."""
    recipe = tree.attrs["recipe_resolved"]
    options = StatisticsOptions(**recipe.get("statistics", {}))
    split, threshold = recipe.get("split"), recipe.get("threshold")
    found = judge(tree, options, split)
    groups = {name: node.to_dataset(inherit=True) for name, node in tree["effects"].children.items()}
    lines = [*_what_ran(tree, found), *_sites_lines(tree, groups), *_total(tree, found, options)]
    lines += _significance_lines(tree, found, options)
    lines += _layer_lines(groups, found)
    if threshold is not None:
        far = sum(int((abs(one["mean"]) >= threshold).sum()) for one in found.sites.values())
        lines.append(f"threshold {threshold:g} (no test): {far} sites have a mean effect at least that far from 0")
    lines += _null_lines(found, split)
    lines += _warnings(tree, groups, found)
    tables = [_top_table(name, dataset, found, tree, options) for name, dataset in groups.items()]
    by_layer = _recovery_table(groups, tree)
    if by_layer is not None:
        tables.insert(0, by_layer)
    if split is not None and found.selected:
        tables.append(_split_table(found, groups))
    return Summary(f"activation patching, {recipe['mode']}", tuple(lines), tuple(tables))


def headline(tree: xr.DataTree) -> str:
    """The strongest site in a line, by its mean effect over pairs."""
    best: tuple[float, str] = (0.0, "")
    for name, node in tree["effects"].children.items():
        dataset = node.to_dataset(inherit=True)
        mean = dataset["effect"].mean("pair", skipna=True)
        for place, labels in _strongest(mean, dataset)[:1]:
            value = float(mean.isel(place))
            columns = zip(_label_columns(mean), labels, strict=True)
            where = ", ".join(f"{column} {label}" for column, label in columns if column != "token")
            best = max(best, (value, f"{name} {where}".strip()), key=lambda one: abs(one[0]))
    if not best[1]:
        return "no site has an effect"
    return f"{first_metric(tree)[0]}: strongest {best[1]}, effect {best[0]:+.3f}"


# --- lines ----------------------------------------------------------------------------------------------------------


def _what_ran(tree: xr.DataTree, found: Judgement) -> list[str]:
    model, recipe = tree.attrs.get("model", {}), tree.attrs["recipe_resolved"]
    mode = recipe["mode"]
    return [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {found.pairs} pair(s), "
        f"mode {mode} ({_MODES[mode]})"
    ]


def _sites_lines(tree: xr.DataTree, groups: dict[str, xr.Dataset]) -> list[str]:
    lines = []
    for name, dataset in groups.items():
        axes = [str(dim) for dim in dataset["effect"].dims if dim != "pair"]
        ranges = [f"{dim} {_runs(dataset[dim].values)}" for dim in axes if not _is_place(dataset, dim)]
        count = int(np.prod([dataset.sizes[dim] for dim in axes])) if axes else 1
        receipts = tree[f"receipts/{name}"].to_dataset()
        fired = receipts["fired"].values
        lines.append(
            f"{name} ({dataset.attrs.get('site', name)}{', layers add up' * ('cumulative' in dataset.attrs)}): {count} sites"
            + (f", {', '.join(ranges)}" if ranges else "")
            + f"; {int((fired > 0).sum())} counterfactuals ran on the "
            f"{receipts.attrs.get('path', '?')} path, "
            f"{int((fired == 0).sum())} are exactly zero by construction"
        )
    return lines


def _total(tree: xr.DataTree, found: Judgement, options: StatisticsOptions) -> list[str]:
    metric, _ = first_metric(tree)
    baseline = tree["baseline"].to_dataset()
    clean, corrupt = baseline[f"{metric}_clean"], baseline[f"{metric}_corrupt"]
    line = f"{metric}: clean {float(clean.mean()):.4f}, corrupt {float(corrupt.mean()):.4f}"
    difference = clean - corrupt
    line += f", total effect {float(difference.mean()):.4f}"
    if difference.sizes["pair"] > 1 and np.isfinite(difference).all():
        ends = mean_effects(
            difference, confidence=options.confidence, resamples=options.bootstrap, seed=options.seed
        )
        line += f" [{float(ends['low']):.4f}, {float(ends['high']):.4f}] (means over pairs)"
    return [line]


def _significance_lines(tree: xr.DataTree, found: Judgement, options: StatisticsOptions) -> list[str]:
    if found.pairs == 1:
        return ["one pair gives effects and no significance"]
    metric, _ = first_metric(tree)
    share = 100 * found.significant / max(1, found.tested)
    attrs = next(iter(found.sites.values())).attrs
    flips = f"{'all ' if attrs['exact'] else ''}{attrs['flips']} sign flips of the pairs"
    line = (
        f"significant: {found.significant} of {found.tested} sites ({share:.1f} %), corrected p at most "
        f"{options.alpha:g} ({_CORRECTIONS[options.correction]} over all of them; {flips}; on the change of {metric})"
    )
    return [line, *([found.note] if found.note else [])]


def _layer_lines(groups: dict[str, xr.Dataset], found: Judgement) -> list[str]:
    """The layers with the strongest significant site, or the strongest site where there is none."""
    by_layer: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, dataset in groups.items():
        one = found.sites[name]
        if "layer" not in one["mean"].dims:
            continue
        for layer in range(one.sizes["layer"]):
            part = one.isel(layer=layer)
            mean = part["mean"].values.reshape(-1)
            there = np.isfinite(mean) & (mean != 0)
            here = (mean[there], part["significant"].values.reshape(-1)[there])
            by_layer.setdefault(int(dataset["layer"].values[layer]), []).append(here)
    sure = any(flags.any() for parts in by_layer.values() for _, flags in parts)
    ranked = []
    for layer, parts in by_layer.items():
        kept = np.concatenate([mean[flags] if sure else mean for mean, flags in parts])
        if len(kept):
            ranked.append((float(kept[np.abs(kept).argmax()]), len(kept), layer))
    ranked.sort(key=lambda entry: (-abs(entry[0]), entry[2]))
    if not ranked:
        return []
    what = "strongest significant effect" if sure else "strongest effect"
    shown = ", ".join(f"{layer} ({strongest:+.3f}{f', {count} sites' * sure})" for strongest, count, layer in ranked[:_LAYERS])
    return [f"top layers, by their {what}: {shown}"]


def _null_lines(found: Judgement, split: float | None) -> list[str]:
    if found.pairs < 2:
        return []
    parts = f"{found.select_pairs} of {found.pairs} pairs"
    if found.null is None:
        return [f"random sites: no site is significant on {parts} alone, so there is no selected set to compare with others"]
    null = {name: float(value) for name, value in found.null.data_vars.items()}
    lines = [
        f"random sites: the {null['size']:.0f} sites selected on {parts} have a mean absolute effect of "
        f"{null['strength']:.3f} on the other {found.estimate_pairs}; as many random sites of the same components "
        f"{null['null_mean']:.3f} (95 % of sets {null['null_low']:.3f} to {null['null_high']:.3f}; p {null['p']:.4f})"
    ]
    if null["controls"]:
        lines.append(
            f"control sets: {null['controls_significant']:.0f} of {null['controls']:.0f} random sets of other sites are "
            f"significant in the same comparison (mean absolute effect {null['control_strength']:.3f})"
        )
    if split is not None:
        again = sum(int(one["significant"].sum()) for one in found.held_out.values())
        lines.append(
            f"split: {found.selected} sites are significant on {parts}, {again} of them on the other "
            f"{found.estimate_pairs} too; the table of held-out effects has no selection bias"
        )
    return lines


def _warnings(tree: xr.DataTree, groups: dict[str, xr.Dataset], found: Judgement) -> list[str]:
    lines = []
    if found.wrong:
        lines.append(f"NaN or infinite values, whose sites have no mean and are in no test: {'; '.join(found.wrong)}")
    baseline = tree["baseline"].to_dataset()
    metric, _ = first_metric(tree)
    gaps = np.abs((baseline[f"{metric}_clean"] - baseline[f"{metric}_corrupt"]).values)
    inputs = tree["inputs"].to_dataset()
    flat = [str(name) for name, gap in zip(inputs["pair_name"].values, gaps, strict=True) if gap < 1e-6]
    if flat:
        lines.append(f"{len(flat)} pair(s) whose two runs agree in {metric} have no effect to normalise: {_some(flat)}")
    if "left_out" in inputs.attrs:
        items = list(inputs.attrs["left_out_items"])
        lines.append(f"{len(items)} item(s) failed the token checks and were left out: {_some(items)}")
    lengths = inputs["n_tokens_corrupt"].values
    if len(set(lengths.tolist())) > 1 and any(one.sizes.get("position", 1) > 1 for one in groups.values()):
        lines.append("prompts differ in length: a position is an index, and other words stand there in other pairs")
    lines += [f"{name}: {one.attrs['note']}" for name, one in groups.items() if "note" in one.attrs]
    return lines


def _some(items: Sequence[str]) -> str:
    more = f"; and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return "; ".join(items[:_NAMED]) + more


def _runs(values: np.ndarray) -> str:
    """Whole numbers for people: 0 to 29, or 3, 7, 9."""
    numbers = [int(value) for value in values]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f", … ({len(numbers)})" if len(numbers) > 8 else "")


# --- tables ---------------------------------------------------------------------------------------------------------


def _top_table(
    name: str, dataset: xr.Dataset, found: Judgement, tree: xr.DataTree, options: StatisticsOptions
) -> SummaryTable:
    metric, _ = first_metric(tree)
    judged, many = found.sites[name], found.pairs > 1
    raw = dataset[metric].mean("pair", skipna=True).transpose(*judged["mean"].dims)
    rows = []
    for place, labels in _strongest(judged["mean"], dataset):
        one = judged.isel(place)
        row: list[Any] = [*labels, float(one["mean"])]
        if many:
            row += [float(one["low"]), float(one["high"]), _p_text(float(one["p_corrected"])), "*" * bool(one["significant"])]
        rows.append((*row, float(raw.isel(place))))
    columns = [*_label_columns(judged["mean"]), "effect"]
    if many:
        columns += ["low", "high", "p", "sig"]
    what = "strongest sites"
    if many:
        what += f", mean over {found.pairs} pairs with {100 * options.confidence:g} % intervals, p corrected"
    return SummaryTable(f"{name}: {what}", (*columns, metric), tuple(rows))


def _split_table(found: Judgement, groups: dict[str, xr.Dataset]) -> SummaryTable:
    rows = []
    for name, judged in found.held_out.items():
        for place, labels in _strongest(judged["mean"], groups[name]):
            one = judged.isel(place)
            columns = zip(_label_columns(judged["mean"]), labels, strict=True)
            where = " ".join(f"{column} {label}" for column, label in columns if column != "token")
            rows.append(
                (f"{name} {where}".strip(), float(one["mean"]), float(one["low"]), float(one["high"]),
                 _p_text(float(one["p_corrected"])), "*" * bool(one["significant"]))
            )  # fmt: skip
    rows.sort(key=lambda row: -abs(row[1]))
    title = f"held-out effects: selected on {found.select_pairs} pairs, estimated on the other {found.estimate_pairs}"
    return SummaryTable(title, ("site", "effect", "low", "high", "p", "sig"), tuple(rows[:_TOP]))


def _recovery_table(groups: dict[str, xr.Dataset], tree: xr.DataTree) -> SummaryTable | None:
    """Recovery of each layer in percent, where every site is a layer."""
    metric, _ = first_metric(tree)
    chosen = {
        name: one[f"recovery_{metric}"].mean("pair", skipna=True)
        for name, one in groups.items()
        if f"recovery_{metric}" in one and _is_by_layer(one)
    }
    if not chosen or len(chosen) < len(groups):
        return None
    values = {
        name: dict(zip(groups[name]["layer"].values.tolist(), array.values.reshape(-1), strict=True))
        for name, array in chosen.items()
    }
    layers = sorted({layer for one in values.values() for layer in one})
    rows = tuple(
        (int(layer), *(f"{one[layer]:.1f}" if layer in one else None for one in values.values())) for layer in layers
    )
    return SummaryTable(f"recovery of {metric} by layer, in percent", ("layer", *values), rows)


def _is_by_layer(dataset: xr.Dataset) -> bool:
    sizes = {str(dim): dataset.sizes[dim] for dim in dataset["effect"].dims if dim != "pair"}
    return "layer" in sizes and all(size == 1 for dim, size in sizes.items() if dim != "layer")


def _strongest(mean: xr.DataArray, dataset: xr.Dataset) -> list[tuple[dict[str, int], list[Any]]]:
    """The places of the strongest means, strongest first, with their labels (a position's token after it)."""
    flat = np.asarray(mean.values).reshape(-1)
    order = np.argsort(-np.abs(np.where(np.isnan(flat), 0.0, flat)), kind="stable")[:_TOP]
    found = []
    for index in order:
        if np.isnan(flat[index]) or flat[index] == 0:
            continue
        unravelled = np.unravel_index(index, mean.shape)
        at = {str(dim): int(place) for dim, place in zip(mean.dims, unravelled, strict=True)}
        labels: list[Any] = []
        for dim, place in at.items():
            labels.append(_selector(dataset) if _is_place(dataset, dim) else int(mean[dim].values[place]))
            if dim == "position":
                labels.append(_token(dataset, place))
        found.append((at, labels))
    return found


def _is_place(dataset: xr.Dataset, dim: str) -> bool:
    """Whether a dim is one position that stands elsewhere in each pair, such as the last."""
    return dim == "position" and dataset.sizes[dim] == 1 and dataset[dim].attrs.get("long_name") != "position"


def _selector(dataset: xr.Dataset) -> str:
    """The position that a component's site selects, as it is written: last, subject."""
    return str(dataset.attrs["site"]).partition("@ ")[2] or "all"


def _label_columns(mean: xr.DataArray) -> list[str]:
    columns = [str(dim) for dim in mean.dims]
    if "position" in columns:
        columns.insert(columns.index("position") + 1, "token")
    return columns


def _token(dataset: xr.Dataset, place: int) -> str:
    texts = dataset["token_text"].isel(position=place).values.reshape(-1)
    distinct = sorted({str(text) for text in texts if text != ""})
    if len(distinct) == 1:
        return repr(distinct[0])
    return f"({len(distinct)} tokens)"


def _p_text(p: float) -> str:
    return "-" if np.isnan(p) else f"{p:.4f}"
