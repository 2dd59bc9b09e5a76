"""What a direction's run says: the choice, scores and rates with intervals, sample texts, and the strongest sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsp.experiments.direction.prompts import PARTS, SETS
from nsp.experiments.direction.scores import CONDITIONS, SCORE, rate
from nsp.report.summary import Summary, SummaryTable
from nsp.statistics import mean_effects, sign_flip_tests

_TOP = 10
_TEXT = 70


def summarise(tree: xr.DataTree) -> Summary:
    """The summary of a finished (or unfinished) store."""
    inputs = tree["inputs"].to_dataset()
    recipe, model = tree.attrs.get("recipe_resolved", {}), tree.attrs.get("model", {})
    behaviour = str(inputs.attrs.get("behaviour", "behaviour"))
    counts = ", ".join(f"{int((inputs['part'].values == part).sum())} {part}" for part in PARTS)
    lines = [f"model {model.get('name', '?')} ({model.get('dtype', '?')}); prompts of both sets: {counts}"]
    lines.append(f"score: log-odds that a reply's first token is one of {_openings(inputs)}")
    tables: list[SummaryTable] = []
    if _finished(tree):
        lines += _chosen_lines(tree, recipe)
        lines += _verdict_lines(tree, behaviour)
        tables += [_scores_table(tree, behaviour)]
        if "generations" in tree.children:
            tables.append(_texts_table(tree))
    else:
        lines.append("the direction is not chosen yet")
    tables += _candidate_tables(tree)
    sites, notes = _site_tables(tree)
    return Summary(f"direction: {behaviour}", (*lines, *notes), (*tables, *sites))


def _openings(inputs: xr.Dataset) -> str:
    """The first tokens, with the openings that are longer than theirs."""
    tokens = []
    for first in inputs.attrs.get("openings", []):
        longer = [text for text in first["openings"] if text != first["token_text"]]
        tokens.append(repr(first["token_text"]) + (f" (of {', '.join(map(repr, longer))})" if longer else ""))
    return ", ".join(tokens)


def _finished(tree: xr.DataTree) -> bool:
    return int(tree["circuit/chosen"].to_dataset()["passed"].values[0]) >= 0


def _chosen_lines(tree: xr.DataTree, recipe: Any) -> list[str]:
    chosen = tree["circuit/chosen"].to_dataset()
    layer, place = int(chosen["layer_of"].values[0]), int(chosen["place"].values[0])
    tried = tree["effects/selection"].to_dataset().sel(layer=layer, position=place)
    token = str(tried["token_text"].values)
    lines = [
        f"chosen: layer {layer}, position {place}" + (f" ({token!r})" if token else "") + "; on the validation part ablation "
        f"lowers the positive prompts' score by {float(tried['drop']):.2f} nats, addition raises the negative ones' by "
        f"{float(tried['rise']):.2f}, and ablation moves the negative ones by a KL of {float(tried['kl']):.3f}"
    ]
    if int(chosen["passed"].values[0]) == 0:
        limit = recipe.get("select", {}).get("max_kl", "?")
        lines.append(
            f"no candidate passed (score lowered by ablation, raised by addition, KL at most {limit}): this is the best of all, "
            "and its effects may be those of a model pushed off its course"
        )
    return lines


def _verdict_lines(tree: xr.DataTree, behaviour: str) -> list[str]:
    """Says plainly where the model does not show the behaviour, or shows it on both sets."""
    if "generations" not in tree.children:
        return [f"no replies were generated, so whether the model shows {behaviour} is not known: effects are on log-odds only"]
    texts = tree["generations"].to_dataset()
    shown = {name: texts["shows_baseline"].values[texts["set"].values == name] for name in SETS}
    count, total, low, high = rate(shown["positive"])
    if count == 0:
        return [
            f"this model does not show {behaviour}: {count} of {total} positive test prompts as they are (95% interval "
            f"{low:.2f} to {high:.2f}); what ablation does is an effect on log-odds only"
        ]
    other, whole, _, _ = rate(shown["negative"])
    return [f"as it is, the model shows {behaviour} in {count} of {total} positive and {other} of {whole} negative test prompts"]


def _scores_table(tree: xr.DataTree, behaviour: str) -> SummaryTable:
    groups = {"baseline": "baseline", "ablated": "effects/ablated", "added": "effects/added"}
    rows = []
    for which in SETS:
        for condition in CONDITIONS:
            dataset = tree[groups[condition]].to_dataset()
            mine = dataset["set"].values == which
            scores = xr.DataArray(dataset[SCORE].values[mine].astype(np.float64), dims=["pair"])
            mean = mean_effects(scores)
            moved = float(np.mean(dataset["kl"].values[mine])) if "kl" in dataset else 0.0
            row: list[Any] = [which, condition, float(mean["mean"]), _ends(mean["low"], mean["high"]), moved]
            if "generations" in tree.children:
                texts = tree["generations"].to_dataset()
                count, total, low, high = rate(texts[f"shows_{condition}"].values[texts["set"].values == which] == 1)
                row += [f"{count} of {total}", _ends(low, high)]
            rows.append(tuple(row))
    columns = ["set", "run", "score", "95% interval", "KL"]
    if "generations" in tree.children:
        columns += [f"shows {behaviour}", "95% interval "]
    return SummaryTable("test part: mean score (bootstrap) and rate in generated texts (Wilson)", tuple(columns), tuple(rows))


def _ends(low: Any, high: Any) -> str:
    return f"{float(low):.2f} to {float(high):.2f}"


def _texts_table(tree: xr.DataTree) -> SummaryTable:
    """The first two test prompts of each set, with what is generated."""
    texts = tree["generations"].to_dataset()
    rows = []
    for which in SETS:
        for row in np.flatnonzero(texts["set"].values == which)[:2]:
            for condition in CONDITIONS:
                text = " ".join(str(texts[f"text_{condition}"].values[row]).split())
                short = text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"
                rows.append((which, int(texts["prompt"].values[row]), condition, short))
    return SummaryTable("generated texts, two test prompts of each set", ("set", "prompt", "run", "text"), tuple(rows))


def _candidate_tables(tree: xr.DataTree) -> list[SummaryTable]:
    tried = tree["effects/selection"].to_dataset()
    least = np.minimum(tried["drop"].values, tried["rise"].values)
    order = np.argsort(-np.where(np.isfinite(least), least, -np.inf).reshape(-1), kind="stable")[:_TOP]
    layers, places = np.unravel_index(order[np.isfinite(least.reshape(-1)[order])], least.shape)
    if not len(layers):
        return []
    names = {"drop": "drop by ablation", "rise": "rise by addition", "kl": "KL"}
    columns = {"layer": tried["layer"].values[layers], "position": tried["position"].values[places]}
    columns |= {text: tried[name].values[layers, places] for name, text in names.items()}
    return [SummaryTable.of("candidates on the validation part, by the smaller of both effects", columns)]


def _site_tables(tree: xr.DataTree) -> tuple[list[SummaryTable], list[str]]:
    """The strongest patched sites, with intervals, and p values corrected over all sites of a mode."""
    swept = {
        name: node.to_dataset(inherit=True)
        for name, node in tree["effects"].children.items()
        if "mode" in node.attrs and np.isfinite(node.to_dataset()["effect"].values).any()
    }
    tables, notes = [], []
    for mode in dict.fromkeys(dataset.attrs["mode"] for dataset in swept.values()):
        family = {name: dataset["effect"] for name, dataset in swept.items() if dataset.attrs["mode"] == mode}
        pairs = next(iter(family.values())).sizes["pair"]
        tests = sign_flip_tests(family)
        note = str(next(iter(tests.values())).attrs.get("note", ""))
        if note:
            notes.append(f"{mode}: {note}")
        rows = []
        for name, effect in family.items():
            site, p = mean_effects(effect), tests[name]["p_corrected"].values
            for index in np.ndindex(*site["mean"].shape):
                mean, low, high = (float(site[key].values[index]) for key in ("mean", "low", "high"))
                if np.isfinite(mean) and mean != 0:
                    at = dict(zip(map(str, site["mean"].dims), index, strict=True))
                    where = ", ".join(f"{dim} {int(site[dim].values[place])}" for dim, place in at.items())
                    label = where + _token(swept[name], at)
                    rows.append((name.removesuffix(f"-{mode}"), label, mean, _ends(low, high), float(p[index])))
        rows.sort(key=lambda row: -abs(row[2]))
        title = f"{mode}: strongest sites, mean over {pairs} pair(s) of test prompts"
        tables.append(SummaryTable(title, ("component", "site", "effect", "95% interval", "p, corrected"), tuple(rows[:_TOP])))
    return tables, notes


def _token(dataset: xr.Dataset, at: Mapping[str, int]) -> str:
    """The token at a place, where all prompts have the same one."""
    if "position" not in at or "token_text" not in dataset.coords:
        return ""
    texts = set(map(str, dataset["token_text"].isel(position=at["position"]).values.reshape(-1)))
    return f" ({texts.pop()!r})" if len(texts) == 1 else ""
