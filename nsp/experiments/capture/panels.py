"""What the report of a capture draws: the units that stand out with the tokens that they fire on, and sizes by layer."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsp.experiments.capture.summary import top_examples, unit_statistics
from nsp.report.panels import Drawing, Series, View, averaged, chart, numbers, short

_UNITS = 60  # of a component, drawn with their top examples
_EXAMPLES = 3


def panels(tree: xr.DataTree) -> list[Drawing]:
    """For each component the units whose largest value stands out most; then mean and spread by layer."""
    found = {str(name): unit_statistics(tree, str(name)) for name in tree["activations"].children}
    views = [View(name, [_standing_out(tree, name, one)]) for name, one in found.items()]
    drawn: list[Drawing] = [
        chart(
            "units that stand out, with their top examples",
            "largest value, in standard deviations above the unit's mean",
            "1",
            "standard deviations",
            "layer",
            views,
        )
    ]
    for variable, meaning in (
        ("std", "standard deviation of a unit, mean over units"),
        ("max", "largest value of any unit"),
    ):
        series = []
        for name, one in found.items():
            values = one[variable]
            rest = [dim for dim in values.dims if dim != "layer"]
            series.append(averaged(name, values.mean(rest) if variable == "std" else values.max(rest), "layer"))
        drawn.append(
            chart(
                f"{'spread' if variable == 'std' else 'largest value'} by layer",
                meaning,
                "activation",
                "activation",
                "layer",
                [View("", series)],
                finding="",
            )
        )
    return drawn


def _standing_out(tree: xr.DataTree, name: str, found: xr.Dataset) -> Series:
    score = ((found["max"] - found["mean"]) / found["std"].where(found["std"] > 0)).fillna(0.0).transpose("layer", ...)
    flat = score.values.reshape(-1)
    best = np.argsort(-flat, kind="stable")[:_UNITS]
    wide = max(1, flat.size // score.sizes["layer"] - 1)
    x, labels = [], []
    for index in best:
        place = np.unravel_index(int(index), score.shape)
        at = {str(dim): int(score[dim].values[one]) for dim, one in zip(score.dims, place, strict=True)}
        shown = top_examples(tree, name, at["layer"], at["neuron"], head=at.get("head"), k=_EXAMPLES)
        told = "; ".join(
            f"{float(value):.3g} in {short(str(text), 80)}"
            for value, text in zip(shown["max"].values, shown["context"].values, strict=True)
        )
        labels.append(", ".join(f"{dim} {one}" for dim, one in at.items()) + f"; top examples: {told}")
        x.append(float(f"{at['layer'] + 0.8 * ((int(index) % (wide + 1)) / wide - 0.5):.5g}"))
    return Series(name, x, numbers(flat[best]), labels=labels, form="points")
