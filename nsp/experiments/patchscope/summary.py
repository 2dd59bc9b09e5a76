"""What a patchscope run says: success by layer pair against its controls, hotspots, consistency, tables.

A *success* is a text whose match class reaches a level (``partial`` or ``strong``). Rates are over sources: the
templates of one source are averaged first, since they share what was read. Everything is computed from the store.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr

from nsp.errors import InputError
from nsp.experiments.patchscope.match import PARTIAL, STRONG
from nsp.report.summary import Summary, SummaryTable
from nsp.statistics.proportion import wilson_interval

Level = Literal["partial", "strong"]
_LEVELS = {"partial": PARTIAL, "strong": STRONG}
_SHADES = " ·░▒▓█"
_CONTROLS = {"random": "random", "unrelated": "unrelated", "none": "no patch"}
_TOP = 10
_TEXT = 60


def success(
    tree: xr.DataTree, level: Level = "partial", variant: str = "patch", template: str | None = None
) -> xr.DataArray:
    """1 where a text reaches the level, 0 where it does not, NaN where no cell ran or nothing was expected.

    Dims (prompt, layer, target_layer). ``variant`` is ``patch``, ``random``, ``unrelated`` or ``none`` (the run without
    a patch, dims (prompt,)); ``template`` keeps the rows of one.
    """
    if level not in _LEVELS:
        raise InputError(f"level {level!r} is none of {', '.join(_LEVELS)}")
    variants = list(tree["effects"].children)
    if variant not in (*variants, "none"):
        raise InputError(f"this run has no variant {variant!r}; it has {', '.join(variants)}, and none")
    match = tree["baseline" if variant == "none" else f"effects/{variant}"].to_dataset()["match"]
    if template is not None:
        templates = match["template"].values
        if template not in templates:
            raise InputError(f"this run has no template {template!r}; it has {', '.join(dict.fromkeys(templates))}")
        match = match.isel(prompt=np.flatnonzero(templates == template))
    reached: xr.DataArray = (match >= _LEVELS[level]).astype(np.float64).where(match >= 0)
    method = str(match.attrs.get("method", ""))
    return reached.assign_attrs(long_name=f"success, {level} or better", units="1", method=method)


def success_rates(
    tree: xr.DataTree, level: Level = "partial", *, template: str | None = None, confidence: float = 0.95
) -> xr.Dataset:
    """The share of sources that succeed at each (layer, target_layer).

    Variables ``rate`` with a Wilson interval ``low`` to ``high`` over the ``n`` sources of the cell, the rates of the
    controls (``random``, ``unrelated``, where they ran, and ``none``), and ``lift``: rate less the largest of them.
    """
    of_source = {"rate": _by_source(success(tree, level, "patch", template))}
    for variant in (name for name in (*tree["effects"].children, "none") if name != "patch"):
        of_source[variant] = _by_source(success(tree, level, variant, template))
    of_source["none"] = of_source["none"].broadcast_like(of_source["rate"])
    n = of_source["rate"].notnull().sum("source")
    rates = {name: values.mean("source") for name, values in of_source.items()}
    low, high = wilson_interval(rates["rate"].values, n.values, confidence)
    controls = [values for name, values in rates.items() if name != "rate"]
    best = xr.concat(controls, "control", coords="minimal", compat="override").max("control")
    interval = {"low": rates["rate"].copy(data=low), "high": rates["rate"].copy(data=high)}
    data = xr.Dataset({**rates, "n": n, **interval, "lift": rates["rate"] - best})
    method = f"mean over sources, each averaged over its templates; Wilson interval of {confidence:.0%}"
    for name, variable in data.data_vars.items():
        variable.attrs = {"long_name": f"{name}, {level} or better", "units": "1", "method": method}
    return data


def consistency(
    tree: xr.DataTree, level: Level = "partial", *, across: Literal["template", "source"] = "template"
) -> xr.DataArray:
    """How far a source's templates agree (or a template's sources), at each (layer, target_layer).

    The share of the majority, success or failure, averaged over sources (or templates): 1 is agreement, 0.5 the least
    there is. NaN where there is one template (or source) alone.
    """
    values = success(tree, level)
    label = "source" if across == "template" else "template"
    share = values.groupby(label).mean("prompt")
    several = values.notnull().groupby(label).sum("prompt") > 1
    agreement: xr.DataArray = share.where(share >= 0.5, 1 - share).where(several & share.notnull()).mean(label)
    return agreement.assign_attrs(long_name=f"agreement across {across}s", units="1", method="share of the majority")


def hotspots(tree: xr.DataTree, level: Level = "partial", top: int = _TOP) -> list[dict[str, Any]]:
    """The layer pairs that do best against their controls, the score's lead over the controls breaking ties.

    Each with ``layer``, ``target_layer``, ``rate``, ``low``, ``high``, ``lift``, ``n`` and ``score_lead`` in nats.
    """
    numbers = success_rates(tree, level).assign(score_lead=score_lead(tree)).transpose("layer", "target_layer")
    columns = {name: numbers[name].values for name in ("rate", "low", "high", "lift", "n", "score_lead")}
    layers, targets = (numbers[dim].values.tolist() for dim in ("layer", "target_layer"))
    rows: list[dict[str, Any]] = []
    for row, column in np.ndindex(len(layers), len(targets)):
        cell = {name: values[row, column].item() for name, values in columns.items()}
        if not (np.isnan(cell["rate"]) and np.isnan(cell["score_lead"])):
            rows.append({"layer": layers[row], "target_layer": targets[column], **cell})

    def order(row: dict[str, Any]) -> tuple[float, ...]:
        return tuple(-np.inf if np.isnan(row[name]) else row[name] for name in ("lift", "score_lead"))

    return sorted(rows, key=order, reverse=True)[:top]


def score_lead(tree: xr.DataTree) -> xr.DataArray:
    """The patched run's log-probability of the answer less the best control's, mean over prompts: (layer,
    target_layer), in nats. Without controls in the grid the run without a patch is the control.
    """
    scores = {name: node.to_dataset()["score"].mean("prompt") for name, node in tree["effects"].children.items()}
    patched = scores.pop("patch")
    best = tree["baseline"].to_dataset()["score"].mean("prompt").broadcast_like(patched)
    for control in scores.values():
        best = best.where(~(control > best), control)
    lead: xr.DataArray = patched - best
    return lead.assign_attrs(long_name="lead of the score over the controls", units="nat", method="mean over prompts")


def heatmap(rates: xr.DataArray, title: str) -> SummaryTable:
    """Rates by (layer, target_layer) as one line of shades a source layer: blank 0, full 1; ``-`` did not run."""
    lines = []
    for layer, row in zip(rates["layer"].values, rates.transpose("layer", "target_layer").values, strict=True):
        shades = "".join("-" if np.isnan(value) else _SHADES[int(np.ceil(value * (len(_SHADES) - 1)))] for value in row)
        best = float(np.nanmax(row)) if np.isfinite(row).any() else float("nan")
        lines.append((int(layer), f"|{shades}|", best))
    targets = rates["target_layer"].values
    shown = f"target layers {', '.join(map(str, targets[:3]))} ... {targets[-1]}"
    return SummaryTable(title, ("layer", shown, "best"), tuple(lines))


def headline(tree: xr.DataTree) -> str:
    """The best layer pair in a line, for lists of runs."""
    best = next(iter(hotspots(tree, top=1)), None)
    if best is None:
        return ""
    if np.isnan(best["rate"]):
        return f"{best['layer']} -> {best['target_layer']}: answer {best['score_lead']:+.2f} nats over controls"
    controls = best["rate"] - best["lift"]
    return f"{best['layer']} -> {best['target_layer']}: {best['rate']:.0%} named or described (controls {controls:.0%})"


def summarise(tree: xr.DataTree) -> Summary:
    """Success against the controls, the best layer pairs with a text each, and a heatmap."""
    inputs, patch = tree["inputs"].to_dataset(), tree["effects/patch"].to_dataset()
    model = tree.attrs.get("model", {})
    templates = list(dict.fromkeys(map(str, inputs["template"].values)))
    sources = list(dict.fromkeys(map(str, inputs["source"].values)))
    ran = int((patch["phase"] >= 0).any("prompt").sum())
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {len(sources)} source(s), templates {', '.join(templates)}",
        f"{ran} of {patch.sizes['layer']} x {patch.sizes['target_layer']} layer pairs ran",
    ]
    tables: list[SummaryTable] = []
    judged = bool((patch["match"] >= 0).any())
    if judged:
        lines += _rates_lines(tree)
    else:
        lines.append("no text was judged: the sources have no phrases; the score of the answer stands alone")
    best = hotspots(tree)
    if best:
        tables.append(_hotspot_table(tree, best))
    if judged:
        title = "success (partial or strong) by source layer and target layer"
        tables.append(heatmap(success_rates(tree)["rate"], title))
        if len(templates) > 1:
            tables.append(_template_table(tree, templates))
    return Summary("patchscope", tuple(lines), tuple(tables))


def _rates_lines(tree: xr.DataTree) -> list[str]:
    lines = []
    levels: tuple[Level, ...] = ("partial", "strong")
    for level in levels:
        means = {str(name): float(values) for name, values in success_rates(tree, level).mean().items()}
        controls = ", ".join(f"{words} {means[name]:.1%}" for name, words in _CONTROLS.items() if name in means)
        lines.append(f"{level} or better, mean over layer pairs: {means['rate']:.1%}; controls: {controls}")
    return lines


def _hotspot_table(tree: xr.DataTree, best: list[dict[str, Any]]) -> SummaryTable:
    texts, match = tree["generations"].to_dataset()["text"], tree["effects/patch"].to_dataset()["match"]
    rows = []
    for row in best:
        at = {"layer": row["layer"], "target_layer": row["target_layer"]}
        classes = np.asarray(match.sel(at).values)
        prompt = int(classes.argmax())
        text = " ".join(str(texts.sel(at).values[prompt]).split())[:_TEXT]
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        source = str(match["source"].values[prompt])
        rows.append(
            (row["layer"], row["target_layer"], row["rate"], interval, row["lift"], row["score_lead"], source, text)
        )
    columns = ("layer", "target", "success", "interval", "over controls", "answer, nats", "source", "text")
    return SummaryTable("best layer pairs", columns, tuple(rows))


def _template_table(tree: xr.DataTree, templates: list[str]) -> SummaryTable:
    rows = []
    for name in templates:
        rates = success_rates(tree, template=name)
        means = [float(rates[key].mean()) if key in rates else float("nan") for key in ("rate", *_CONTROLS)]
        rows.append((name, float(rates["rate"].max()), *means))
    agreement = consistency(tree)
    columns = ("template", "best pair", "mean", *_CONTROLS.values())
    return SummaryTable(f"by template (agreement across templates {float(agreement.mean()):.2f})", columns, tuple(rows))


def _by_source(values: xr.DataArray) -> xr.DataArray:
    return values.groupby("source").mean("prompt")
