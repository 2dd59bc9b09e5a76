"""Figures of a direction: scores and rates with intervals, texts, candidates, and patched sites."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from nsp.experiments.direction.prompts import SETS
from nsp.experiments.direction.scores import CONDITIONS, SCORE, rate
from nsp.report.default_figures import figures_by_dims
from nsp.report.figures import Bars, Figure, Grid, Series, View, diverging, figure, with_interval
from nsp.report.labels import short, token_label
from nsp.statistics import mean_effects

_GROUPS = {"baseline": "baseline", "ablated": "effects/ablated", "added": "effects/added"}
_CANDIDATES = {
    "drop": "drop of the positive prompts' score by ablation",
    "rise": "rise of the negative prompts' score by addition",
    "kl": "KL that ablation makes",
}
_X = np.arange(len(CONDITIONS), dtype=float)


def figures(tree: xr.DataTree) -> list[Figure]:
    """Scores and rates of the test prompts, their texts, the candidates, and the sites that carry the direction."""
    found = [figure("scores", "score of the test prompts", partial(_scores, tree))]
    if "generations" in tree.children:
        behaviour = str(tree["inputs"].attrs.get("behaviour", "the behaviour"))
        found.append(figure("rates", f"generated texts that show {behaviour}", partial(_rates, tree)))
        found.append(figure("texts", "texts of the test prompts", partial(_texts, tree)))
    views = [View(make=partial(_candidate, tree, name), name=text) for name, text in _CANDIDATES.items()]
    found.append(figure("candidates", "candidates on the validation part", *views))
    sites = [f"effects/{name}" for name, node in tree["effects"].children.items() if "mode" in node.attrs]
    return found + figures_by_dims(tree, sites)



def _scored(tree: xr.DataTree, name: str) -> xr.Dataset:
    return tree[_GROUPS[name]].to_dataset().load()


def _scores(tree: xr.DataTree) -> Bars:
    series = []
    for which in SETS:
        means = []
        for name in CONDITIONS:
            one = _scored(tree, name)
            chosen = np.asarray(one[SCORE].values[one["set"].values == which], dtype=np.float64)
            means.append(mean_effects(xr.DataArray(chosen, dims=["pair"])))
        y, low, high = (np.array([float(one[key]) for one in means]) for key in ("mean", "low", "high"))
        series.append(Series(name=f"{which} prompts", x=_X, y=y, low=low, high=high))
    base, ablated = series[0].y[:2]
    moved = ""
    if np.isfinite([base, ablated]).all() and series[0].low is not None and series[0].high is not None:
        ends = with_interval(float(ablated), float(series[0].low[1]), float(series[0].high[1]), "nats")
        moved = f"ablating the direction moves the positive test prompts' mean score from {base:.3g} to {ends}"
    meaning = "log-odds that the reply opens with the behaviour, mean with its interval"
    return Bars(series=tuple(series), ticks=tuple(CONDITIONS), x="run", y="score", meaning=meaning, units="nats", finding=moved)


def _rates(tree: xr.DataTree) -> Bars:
    texts = tree["generations"].to_dataset().load()
    series = []
    for which in SETS:
        mine = texts["set"].values == which
        rates = [rate(texts[f"shows_{name}"].values[mine] == 1) for name in CONDITIONS]
        notes = tuple(f"{name}: {count} of {total}" for name, (count, total, _, _) in zip(CONDITIONS, rates, strict=True))
        shares = np.array([count / total if total else np.nan for count, total, _, _ in rates])
        low, high = (np.array([one[end] for one in rates], dtype=float) for end in (2, 3))
        series.append(Series(name=f"{which} prompts", x=_X, y=shares, low=low, high=high, notes=notes))
    meaning = "share of the test prompts, with its Wilson interval"
    return Bars(series=tuple(series), ticks=tuple(CONDITIONS), x="run", y="share", meaning=meaning, finding="")


def _texts(tree: xr.DataTree) -> Grid:
    """Test prompts against runs: the score of each, and the text that followed."""
    inputs, texts = tree["inputs"].to_dataset(), tree["generations"].to_dataset().load()
    asked = dict(zip(inputs["prompt"].values.tolist(), inputs["text"].values.tolist(), strict=True))
    ids = texts["prompt"].values.tolist()[::-1]  # the first prompt on top
    values, shows, told = (
        np.stack([column(name)[::-1] for name in CONDITIONS], axis=1)
        for column in (
            lambda name: np.asarray(_scored(tree, name)[SCORE].values[: len(ids)], dtype=np.float64),
            lambda name: texts[f"shows_{name}"].values.astype(float),
            lambda name: texts[f"text_{name}"].values.astype(object),
        )
    )
    prompts = np.array([[short(str(asked.get(one, "")), 160)] * len(CONDITIONS) for one in ids], dtype=object)
    return Grid(
        values=values,
        rows=tuple(f"{which[:3]} {one}" for which, one in zip(texts["set"].values[::-1].tolist(), ids, strict=True)),
        columns=tuple(CONDITIONS),
        y="prompt",
        x="run",
        scale=diverging(values),
        details={"prompt": prompts, "shows it": shows, "text": told},
        meaning="score of each reply; point at a cell to read it",
        units="nats",
        finding="",
    )


def _candidate(tree: xr.DataTree, name: str) -> Grid:
    """What the difference of means at each layer and position does, by one of three measures."""
    tried = tree["effects/selection"].to_dataset().load().transpose("layer", "position", ...)
    tokens = tried["token_text"].values if "token_text" in tried.coords else [""] * tried.sizes["position"]
    places = tried["position"].values
    values = {one: np.asarray(tried[one].values, dtype=np.float64) for one in _CANDIDATES}
    return Grid(
        values=values[name],
        rows=tuple(map(str, tried["layer"].values)),
        columns=tuple(token_label(str(token), place) or str(place) for token, place in zip(tokens, places, strict=True)),
        y="layer",
        x="position",
        scale=diverging(values[name]),
        details={one: part for one, part in values.items() if one != name},
        meaning=_CANDIDATES[name],
        units="nats",
    )
