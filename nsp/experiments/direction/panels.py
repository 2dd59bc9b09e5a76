"""What the report of a direction draws: scores and rates with intervals, texts, candidates, and patched sites."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.experiments.direction.prompts import SETS
from nsp.experiments.direction.scores import CONDITIONS, SCORE, rate
from nsp.report.panels import Drawing, Layer, Panel, Series, View, chart, numbers, panel, panels_of, short
from nsp.statistics import mean_effects

_GROUPS = {"baseline": "baseline", "ablated": "effects/ablated", "added": "effects/added"}


def panels(tree: xr.DataTree) -> list[Drawing]:
    """Scores and rates of the test prompts, their texts, the candidates, and the sites that carry the direction."""
    scores = {name: tree[path].to_dataset().load() for name, path in _GROUPS.items()}
    drawn: list[Drawing] = [_scores(scores)]
    if "generations" in tree.children:
        texts = tree["generations"].to_dataset().load()
        drawn += [
            _rates(texts, str(tree["inputs"].attrs.get("behaviour", "the behaviour"))),
            _texts(tree, scores, texts),
        ]
    drawn.append(_candidates(tree["effects/selection"].to_dataset().load()))
    sites = [f"effects/{name}" for name, node in tree["effects"].children.items() if "mode" in node.attrs]
    return drawn + panels_of(tree, sites)


def _scores(scores: dict[str, xr.Dataset]) -> Drawing:
    series = []
    for which in SETS:
        values: list[float | None] = []
        low: list[float | None] = []
        high: list[float | None] = []
        for name in CONDITIONS:
            one = scores[name]
            chosen = np.asarray(one[SCORE].values[one["set"].values == which], dtype=np.float64)
            found = mean_effects(xr.DataArray(chosen, dims=["pair"]))
            for ends, key in ((values, "mean"), (low, "low"), (high, "high")):
                ends += numbers(found[key].values)
        series.append(Series(f"{which} prompts", [0.0, 1.0, 2.0], values, low, high, form="bars"))
    return chart(
        "score of the test prompts", "log-odds that the reply opens with the behaviour, mean with its interval", "nats", "score", "run",
        [View("", series)], ticks=list(CONDITIONS), finding=_moved(series[0]),
    )  # fmt: skip


def _moved(positive: Series) -> str:
    base, ablated = positive.y[0], positive.y[1]
    if base is None or ablated is None:
        return ""
    ends = (
        f" [{positive.low[1]:.3g}, {positive.high[1]:.3g}]"
        if positive.low and positive.high and positive.low[1] is not None
        else ""
    )
    return f"ablating the direction moves the positive test prompts' mean score from {base:.3g} to {ablated:.3g}{ends} nats"


def _rates(texts: xr.Dataset, behaviour: str) -> Drawing:
    series = []
    for which in SETS:
        mine = texts["set"].values == which
        found = [rate(texts[f"shows_{name}"].values[mine] == 1) for name in CONDITIONS]
        labels = [f"{name}: {count} of {total}" for name, (count, total, _, _) in zip(CONDITIONS, found, strict=True)]
        shares = numbers([count / total if total else np.nan for count, total, _, _ in found])
        series.append(
            Series(
                f"{which} prompts",
                [0.0, 1.0, 2.0],
                shares,
                numbers([one[2] for one in found]),
                numbers([one[3] for one in found]),
                labels,
                "bars",
            )
        )
    return chart(
        f"generated texts that show {behaviour}",
        "share of the test prompts, with its Wilson interval",
        "1",
        "share",
        "run",
        [View("", series)],
        ticks=list(CONDITIONS),
        finding="",
    )


def _texts(tree: xr.DataTree, scores: dict[str, xr.Dataset], texts: xr.Dataset) -> Panel:
    """Test prompts against runs: the score of each, and the text that followed."""
    inputs = tree["inputs"].to_dataset()
    asked = dict(zip(inputs["prompt"].values.tolist(), inputs["text"].values.tolist(), strict=True))
    ids = texts["prompt"].values.tolist()
    order = range(len(ids))[::-1]  # the first prompt on top
    grid = np.array([[scores[name][SCORE].values[row] for name in CONDITIONS] for row in order], dtype=np.float64)
    told = [[short(str(texts[f"text_{name}"].values[row]), 300) or None for name in CONDITIONS] for row in order]
    shows = [[float(texts[f"shows_{name}"].values[row]) for name in CONDITIONS] for row in order]
    prompts = [[short(str(asked.get(ids[row], "")), 160) or None] * len(CONDITIONS) for row in order]
    rows = [f"{texts['set'].values[row][:3]} {ids[row]}" for row in order]
    layer = Layer(
        "",
        [numbers(row) for row in grid],
        details={
            "prompt": prompts,
            "shows it": shows,
            "text": told,
        },
    )
    meaning = "score of each reply; point at a cell to read it"
    return panel(
        "texts of the test prompts",
        meaning,
        "nats",
        ("prompt", "run"),
        rows,
        list(CONDITIONS),
        [layer],
        variable=SCORE,
        finding="",
    )


def _candidates(tried: xr.Dataset) -> Panel:
    rows = [str(layer) for layer in tried["layer"].values]
    tokens = tried["token_text"].values if "token_text" in tried.coords else [""] * tried.sizes["position"]
    columns = [f"{str(token)!r} {place}" for token, place in zip(tokens, tried["position"].values, strict=True)]
    names = {
        "drop": "drop of the positive prompts' score by ablation",
        "rise": "rise of the negative prompts' score by addition",
        "kl": "KL that ablation makes",
    }
    grids = {name: [numbers(row) for row in tried[name].transpose("layer", "position").values] for name in names}
    layers = [
        Layer(text, grids[name], details={other: grids[other] for other in names if other != name})
        for name, text in names.items()
    ]
    finite = [abs(cell) for name in ("drop", "rise") for row in grids[name] for cell in row if cell is not None]
    return panel(
        "candidates on the validation part", "what the difference of means at each layer and position does", "nats", ("layer", "position"),
        rows, columns, layers, reach=max([*finite, 1e-9]),
    )  # fmt: skip
