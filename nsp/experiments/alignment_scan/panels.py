"""What the report of an alignment scan draws: precision and recall of neurons on held-out prompts, and where they are."""

from __future__ import annotations

import numpy as np

from nsp.experiments.alignment_scan.select import AlignmentNeurons
from nsp.report.panels import Drawing, Series, View, chart, numbers, spread


def alignment_panels(found: AlignmentNeurons) -> list[Drawing]:
    """Precision against recall of every neuron that fires, and the selected ones by layer."""
    groups = {
        "confirmed": found.confirmed,
        "selected, not confirmed": found.selected & ~found.confirmed,
        "not selected": ~found.selected & (found.searched.harmful + found.searched.normal > 0),
    }
    views = []
    for name, half in (("held-out prompts", found.held), ("searched prompts", found.searched)):
        series = []
        for group, flags in groups.items():
            there = np.flatnonzero(flags)
            there = there[spread(len(there), half.recall[there])]
            if len(there):
                labels = [f"layer {found.layer[at]}, neuron {found.neuron[at]}, q {found.q[at]:.2g}" for at in there]
                series.append(
                    Series(
                        group,
                        [float(value or 0) for value in numbers(half.recall[there])],
                        numbers(half.precision[there]),
                        labels=labels,
                        form="points",
                    )
                )
        views.append(View(name, series))
    layers = sorted(set(found.layer.tolist()))
    bars = [
        Series(group, [float(layer) for layer in layers], [float((flags & (found.layer == layer)).sum()) for layer in layers], form="bars")
        for group, flags in groups.items() if group != "not selected"
    ]  # fmt: skip
    selected, confirmed = int(found.selected.sum()), int(found.confirmed.sum())
    said = (
        f"neurons that fire on harmful prompts: {selected} selected, {confirmed} of them confirmed on held-out prompts"
    )
    drawn: list[Drawing] = [
        chart(
            "precision and recall of neurons",
            "share of the prompts it fires on that are harmful, against the share of harmful prompts it fires on",
            "1",
            "precision",
            "recall",
            views,
            tell_x=True,
            finding=said,
        )
    ]
    if found.selected.any():
        drawn.append(
            chart(
                "selected neurons by layer",
                "how many neurons of each layer were selected",
                "neurons",
                "neurons",
                "layer",
                [View("", bars)],
                finding="",
            )
        )
    return drawn
