"""What the report of a steering run draws: every number over the multipliers, and each prompt's texts."""

from __future__ import annotations

import xarray as xr

from nsp.report.panels import Cells, Drawing, Layer, Panel, View, averaged, chart, numbers, panel, short


def panels(tree: xr.DataTree) -> list[Drawing]:
    """Lines over multipliers, and a grid of prompts against multipliers whose cells hold the texts."""
    effects = tree["effects/next_token"].to_dataset().load()
    count = effects.sizes["prompt"]
    over = f"mean over {count} prompts" if count > 1 else ""
    drawn: list[Drawing] = []
    if "tokens" in tree["effects"].children:
        tokens = tree["effects/tokens"].to_dataset().load()
        series = [
            averaged(repr(str(text)), tokens["prob"].isel(token=number, drop=True), "direction")
            for number, text in enumerate(tokens["token_text"].values)
        ]
        drawn.append(
            chart(
                "tokens followed",
                "probability as the next token",
                "1",
                "probability",
                "multiplier",
                [View(over, series)],
            )
        )
    moved = [View(over, [averaged("KL", effects["kl"], "direction")])]
    drawn.append(
        chart(
            "how far the next token moves",
            "KL(unsteered || steered) of the next token",
            "nats",
            "KL",
            "multiplier",
            moved,
        )
    )
    if "generations" in tree.children:
        made = tree["generations"].to_dataset().load()
        for name, meaning in (
            ("perplexity", "perplexity of the texts in the unsteered model"),
            ("repetition", "share of trigrams that repeat"),
        ):
            views = [View(over, [averaged(name, made[name], "direction")])]
            drawn.append(chart(f"{name} of the texts", meaning, "1", name, "multiplier", views, finding=""))
        drawn.append(_texts(tree, made))
    return drawn


def _texts(tree: xr.DataTree, made: xr.Dataset) -> Panel:
    """Prompts against multipliers: the perplexity of each text, and the text."""
    prompts = [short(str(text), 40) for text in tree["inputs"].to_dataset()["text"].values][::-1]  # the first on top
    part = (
        made[["perplexity", "repetition", "text"]]
        .transpose("prompt", "direction", ...)
        .isel(prompt=slice(None, None, -1))
    )
    told: dict[str, Cells] = {
        "text": [[short(str(text), 400) or None for text in row] for row in part["text"].values],
        "repetition": [numbers(row) for row in part["repetition"].values],
    }
    layer = Layer("", [numbers(row) for row in part["perplexity"].values], details=told)
    multipliers = [f"{value:g}" for value in made["multiplier"].values]
    meaning = "perplexity of each text in the unsteered model; point at a cell to read the text"
    return panel("texts", meaning, "1", ("prompt", "multiplier"), prompts, multipliers, [layer], finding="")
