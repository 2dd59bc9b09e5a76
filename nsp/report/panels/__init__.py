"""What a report draws, as plain data prepared from a run's results: heatmaps (`Panel`) and charts (`Chart`).

`panels_of` draws any run by its labels alone; an experiment that has more to show gives `Experiment.panels`, a function
from the run's tree to drawings, built from the shapes and helpers here.
"""

from nsp.report.panels.charts import averaged, by_layer, chart, spread
from nsp.report.panels.grids import grid_panel, panel, panels_of, strongest
from nsp.report.panels.labels import short, visible
from nsp.report.panels.shapes import Cells, Chart, Drawing, Layer, Panel, Series, View, numbers, rounded, same_scale

__all__ = [
    "Cells",
    "Chart",
    "Drawing",
    "Layer",
    "Panel",
    "Series",
    "View",
    "averaged",
    "by_layer",
    "chart",
    "grid_panel",
    "numbers",
    "panel",
    "panels_of",
    "rounded",
    "same_scale",
    "short",
    "spread",
    "strongest",
    "visible",
]
