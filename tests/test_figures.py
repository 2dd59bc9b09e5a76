"""The heatmap: what is drawn where, its labels, and what colours mean."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from nsp.errors import InputError
from nsp.report.default_figures import base_value
from nsp.report.drawing import draw
from nsp.report.figures import Picture
from nsp.report.site_panels import heatmap as prepared

TOKENS = ["When", " Mary", " and", " John", " went", " to"]


def sweep(tokens: Sequence[str] = TOKENS, layers: int = 4, **units: int) -> xr.Dataset:
    """A dataset of effects, dims (pair, layer, position, *units); the second pair is two tokens shorter."""
    shape = (2, layers, len(tokens), *units.values())
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[1, :, -2:] = np.nan
    texts = np.array([tokens, [*tokens[:-2], "", ""]], dtype=object)
    dims = ("pair", "layer", "position", *units)
    return xr.Dataset(
        {
            "effect": (dims, values, {"long_name": "normalised effect", "units": "1"}),
            "logit_diff": (dims, 4 * values - 2, {"long_name": "logit difference", "units": "logits"}),
            "logit_diff_base": (("pair",), np.array([-2.0, -3.0])),
        },
        coords={
            "layer": np.arange(layers) + 10,
            "position": np.arange(len(tokens)),
            "token_text": (("pair", "position"), texts),
            **{unit: np.arange(size) for unit, size in units.items()},
        },
    )


def heatmap(data: xr.Dataset, metric: str = "effect", pair: Any = 0, **options: Any) -> Figure:
    figure = draw(Picture("title", (("", prepared(data, metric, pair, **options)),)))
    assert isinstance(figure, Figure)
    return figure


def image(figure: Figure) -> Any:
    return figure.axes[0].images[0]


def labels(figure: Figure, axis: str = "x") -> list[str]:
    ticks = figure.axes[0].get_xticklabels() if axis == "x" else figure.axes[0].get_yticklabels()
    return [tick.get_text() for tick in ticks]


def render(figure: Figure) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph, a label that does not fit
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_layers_go_up_and_positions_carry_their_tokens() -> None:
    data = sweep()
    figure = heatmap(data)
    np.testing.assert_array_equal(image(figure).get_array(), data["effect"].isel(pair=0).values)
    assert image(figure).origin == "lower"
    assert labels(figure) == ["When 0", "␣Mary 1", "␣and 2", "␣John 3", "␣went 4", "␣to 5"]
    assert labels(figure, "y") == ["10", "11", "12", "13"]
    assert render(figure).startswith(b"\x89PNG")


def test_colours_are_centred_on_no_effect() -> None:
    data = sweep()
    norm = image(heatmap(data)).norm
    assert norm.vcenter == 0
    assert -norm.vmin == pytest.approx(norm.vmax) == pytest.approx(float(abs(data["effect"][0]).max()))
    assert image(heatmap(data, "logit_diff", 1)).norm.vcenter == -3
    assert image(heatmap(data, "logit_diff", base=1.5)).norm.vcenter == 1.5
    assert image(heatmap(data * 0)).norm.vmax == 1  # all effects zero: white, not an error


def test_the_colour_bar_names_quantity_and_units() -> None:
    assert heatmap(sweep()).axes[1].get_ylabel() == "normalised effect"
    assert heatmap(sweep(), "logit_diff").axes[1].get_ylabel().replace("\n", " ") == "logit difference [logits]"


def test_padding_is_left_out_and_missing_cells_are_hatched() -> None:
    data = sweep()
    data["effect"][1, 0, 1] = np.nan
    figure = heatmap(data, pair=1)
    array = image(figure).get_array()
    assert array.shape == (4, 4)
    assert np.ma.getmaskarray(array).sum() == 1
    assert figure.axes[0].patches[0].get_hatch()
    assert "hatched: no value" in figure.axes[0].get_title(loc="left")


def test_heads_fold_to_the_strongest_or_are_chosen() -> None:
    data = sweep(head=3)
    values = data["effect"].isel(pair=0).values
    figure = heatmap(data)
    strongest = np.take_along_axis(values, np.abs(values).argmax(-1)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(image(figure).get_array(), strongest)
    assert "the strongest head of 3 in each cell" in figure.axes[0].get_title(loc="left")
    np.testing.assert_array_equal(image(heatmap(data, units={"head": 2})).get_array(), values[..., 2])
    figure = heatmap(data.isel(position=[3]))
    assert figure.axes[0].get_xlabel() == "head"
    np.testing.assert_array_equal(image(figure).get_array(), values[:, 3])


@pytest.mark.parametrize("without", ["layer", "position", "pair"])
def test_sweeps_without_some_dim_are_drawn_too(without: str) -> None:
    figure = heatmap(sweep().isel({without: 0}, drop=True))
    assert image(figure).get_array().size > 0
    render(figure)


def test_awkward_tokens_are_drawn_as_text() -> None:
    tokens = [" $x^2$", "a_b", "\n", "\\xe2\\x80", "日本", "🙂", " internationalisation", ""]
    figure = heatmap(sweep([*tokens, "b", "c"]))
    assert labels(figure)[0] == "␣$x^2$ 0"
    assert labels(figure)[2] == "\\n 2"
    assert labels(figure)[6] == "␣internationali… 6"
    render(figure)


def test_a_large_sweep_stays_readable() -> None:
    figure = heatmap(sweep([f" token{index}" for index in range(60)], layers=40), pair=0)
    figure.draw_without_rendering()
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for ticks in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        boxes = [tick.get_window_extent(renderer) for tick in ticks]
        assert not any(one.overlaps(two) for one, two in pairwise(boxes))
    assert not any(isinstance(item, QuadMesh) for item in figure.axes[0].collections)


def test_mistakes_say_what_there_is() -> None:
    data = sweep(head=3)
    for options, message in (
        ({"metric": "efect"}, "did you mean 'effect'"),
        ({"metric": "logit_diff_base"}, "there is no metric 'logit_diff_base' to draw"),
        ({"pair": 2}, "there is no pair 2; the store has 0 to 1"),
        ({"pair": -1}, "there is no pair -1"),
        ({"units": {"head": 7}}, "there is no head 7; the store has 0 to 2"),
        ({"units": {"neuron": 0}}, "has no dim 'neuron'"),
    ):
        with pytest.raises(InputError, match=message):
            heatmap(data, **options)  # type: ignore[arg-type]


def test_a_run_of_prompts_draws_one_of_them() -> None:
    data = sweep().rename(pair="prompt")
    figure = heatmap(data, pair=1)
    np.testing.assert_array_equal(image(figure).get_array(), data["effect"].values[1, :, :4])
    assert "prompt 1" in figure.axes[0].get_title(loc="left")
    with pytest.raises(InputError, match="there is no prompt 2; the store has 0 to 1"):
        heatmap(data, pair=2)


def test_the_base_value_of_a_store() -> None:
    inputs = xr.Dataset({"base": (("pair",), np.array(["corrupt", "clean"], dtype=object))})
    baseline = xr.Dataset({"kl_clean": (("pair",), [1.0, 2.0]), "kl_corrupt": (("pair",), [3.0, 4.0])})
    tree = xr.DataTree.from_dict({"inputs": inputs, "baseline": baseline})
    assert base_value(tree, "kl", 0) == 3
    assert base_value(tree, "kl", 1) == 2
    assert base_value(tree, "kl", 2) is None
    assert base_value(tree, "l2", 0) is None
    assert base_value(xr.DataTree(), "kl", 0) is None
