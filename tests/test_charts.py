"""Bars, scatter and curves: what is drawn against the data, and mistakes that say what there is."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

import nsp.experiments.accessor  # registers tree.nsp
from nsp.errors import InputError
from nsp.statistics import mean_effects

ATTRS = {"long_name": "change of the metric", "units": "logits", "method": "made up by the tests"}


def tree(pairs: int = 6, layers: int = 4, heads: int = 3) -> xr.DataTree:
    """Effects and estimates (pair, layer, head), with no value in layer 2, and curves of two prompts and two methods."""
    assert nsp.experiments.accessor is not None
    dims = ("pair", "layer", "head")
    values = np.random.default_rng(0).normal(size=(pairs, layers, heads))
    values[:, 2] = np.nan
    coords = {"pair": np.arange(pairs), "layer": np.arange(layers) + 7, "head": np.arange(heads)}
    curves: dict[str, Any] = {
        "empty": (("prompt",), np.array([1.0, 3.0])),
        "whole": (("prompt",), np.array([5.0, 7.0])),
    }
    for measure in ("faithfulness", "completeness", "minimality"):
        curves[f"{measure}_atp"] = (("prompt", "step"), np.array([[1.0, 3.0, 5.0], [3.0, 3.0, 7.0]]))
    found = xr.DataTree.from_dict(
        {
            "effects/z": xr.Dataset({"change": (dims, values, ATTRS)}, coords),
            "attribution/z": xr.Dataset({"atp": (dims, 2 * values, ATTRS)}, coords),
            "circuit/curves-zero": xr.Dataset(
                curves, {"proportion": (("step",), np.array([0.01, 0.1, 1.0]))}, {"universe": 100}
            ),
        }
    )
    found.attrs = {"kind": "attribution", "model": {"name": "tiny"}}
    return found


def render(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_bars_are_the_strongest_mean_of_each_layer_with_its_interval() -> None:
    run = tree()
    figure = run.nsp.plot("bars")
    axes = figure.axes[0]
    found = mean_effects(run["effects/z"].to_dataset()["change"])
    mean = found["mean"].values
    best = {layer: int(np.abs(mean[layer]).argmax()) for layer in (0, 1, 3)}
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.containers[0]}
    assert bars == pytest.approx({layer: mean[layer, head] for layer, head in best.items()})
    (lines,) = axes.containers[1][2]
    for (layer, head), line in zip(best.items(), lines.get_segments(), strict=True):
        expected = [found["low"].values[layer, head], found["high"].values[layer, head]]
        np.testing.assert_allclose(sorted(line[:, 1]), expected)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["7", "8", "9", "10"]
    title = axes.get_title(loc="left").replace("\n", " ")
    assert "mean of 6 pairs, 95 % interval" in title
    assert "hatched: no value" in title
    assert any(patch.get_hatch() for patch in axes.patches)  # layer 9 is missing, not zero
    assert "[logits]" in axes.get_ylabel()
    assert render(figure).startswith(b"\x89PNG")


def test_one_pair_has_bars_and_no_interval() -> None:
    axes = tree(pairs=1).nsp.plot("bars").axes[0]
    assert "no interval" in axes.get_title(loc="left")
    assert not any("errorbar" in type(container).__name__.lower() for container in axes.containers)


def test_the_scatter_has_every_site_and_the_identity_line() -> None:
    run = tree()
    axes = run.nsp.plot("scatter").axes[0]
    points = axes.collections[0].get_offsets()
    values = run["effects/z"].to_dataset()["change"].values.ravel()
    values = values[np.isfinite(values)]
    np.testing.assert_allclose(points, np.stack([2 * values, values], axis=1))
    x, y = axes.lines[0].get_data()
    np.testing.assert_array_equal(x, y)
    assert axes.get_title(loc="left").replace("\n", " ").endswith("n = 54 sites, 18 without a value left out")


def test_faithfulness_is_normalised_as_in_the_summary() -> None:
    axes = tree().nsp.plot("faithfulness").axes[0]
    line = axes.lines[0]
    np.testing.assert_allclose(line.get_xdata(), [0.01, 0.1, 1.0])
    np.testing.assert_allclose(line.get_ydata(), [0.0, 0.25, 1.0])  # means 2, 3, 6 between 2 (empty) and 6 (whole)
    assert line.get_label() == "atp"
    assert axes.get_xscale() == "log"


def test_the_accessor_draws_trees_and_datasets() -> None:
    run = tree()
    whole, part = run.nsp.plot(component="z", pair=1), run["effects/z"].to_dataset().nsp.plot(metric="change", pair=1)
    arrays = [figure.axes[0].images[0].get_array() for figure in (whole, part)]
    np.testing.assert_array_equal(*arrays)
    np.testing.assert_allclose(arrays[0].filled(np.nan), run["effects/z"].to_dataset()["change"].values[1])


def test_mistakes_say_what_there_is() -> None:
    run = tree()
    for options, message in (
        ({"what": "barz"}, "did you mean 'bars'"),
        ({"what": "bars", "component": "x"}, "there is no 'x' to draw"),
        ({"what": "bars", "metric": "chang"}, "did you mean 'change'"),
        ({"what": "scatter", "metric": "relp"}, r"there is no metric 'relp'.*\(atp\)"),
    ):
        with pytest.raises(InputError, match=message):
            run.nsp.plot(**options)
    with pytest.raises(InputError, match="an attribution run with exact effects; this is one of None, which has heatmap, bars"):
        xr.DataTree.from_dict({"effects/z": run["effects/z"].to_dataset()}).nsp.plot("scatter")
    with pytest.raises(InputError, match="draws as a heatmap"):
        run["effects/z"].to_dataset().nsp.plot("bars")
