"""What the report of a contrast draws: the units that differ most, and how well each layer's vector separates the sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsp.report.panels import Drawing, Series, View, averaged, by_layer, chart


def panels(tree: xr.DataTree) -> list[Drawing]:
    """Units by layer with their effect sizes, and the control vectors' separation by layer."""
    groups: dict[str, Any] = {
        str(name): node.to_dataset().load()
        for name, node in tree["attribution"].children.items()
        if not str(name).endswith("-neurons")
    }
    views = [View(name, [_units(dataset)]) for name, dataset in groups.items()]
    drawn: list[Drawing] = [
        chart(
            "units that tell the sets apart",
            "effect size of positive less negative prompts, the largest",
            "1",
            "Cohen's d",
            "layer",
            views,
        )
    ]
    for variable, title, meaning in (
        ("separation", "control vectors by layer", "how far apart held-out prompts lie along the vector"),
        (
            "right_side",
            "held-out prompts on the right side",
            "share of held-out prompts that the vector puts on their side",
        ),
    ):
        series = [
            averaged(name, dataset[variable], "layer")
            for name, dataset in groups.items()
            if dataset[variable].dims == ("layer",)
        ]
        label = "Cohen's d" if variable == "separation" else "share"
        drawn += (
            [
                chart(
                    title,
                    meaning,
                    "1",
                    label,
                    "layer",
                    [View("", series)],
                    **({} if variable == "separation" else {"finding": ""}),
                )
            ]
            if series
            else []
        )
    return drawn


def _units(dataset: xr.Dataset) -> Series:
    d = dataset["cohen_d"]
    unit = next(str(dim) for dim in d.dims if dim != "layer")
    order = ("layer", unit)
    difference, p = (np.asarray(dataset[name].transpose(*order).values) for name in ("difference", "p_corrected"))

    def told(row: int, place: int) -> str:
        return f"difference {difference[row, place]:.3g}, corrected p {p[row, place]:.3g}"

    return by_layer(unit, d, unit, told)
