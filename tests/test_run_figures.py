"""Figures of whole runs, static and interactive: what is drawn is what the store has, on small stores made by hand."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from rich.console import Console

import nsp.experiments.accessor  # registers tree.nsp
from nsp.cli.app import main
from nsp.errors import InputError
from nsp.experiments.capture.summary import unit_statistics
from nsp.experiments.patchscope.summary import success_rates
from nsp.experiments.run_figures import WHAT, drawable, named, picture_of, small_heatmaps
from nsp.report.drawing import draw
from nsp.report.drawing.terminal import text_grid
from nsp.report.figures import Grid, Picture, Scale, five_numbers
from nsp.report.summary import Summary
from nsp.statistics import mean_effects

TOKENS = ["When", " <b>Mary", " went", ""]
RANDOM = np.random.default_rng(3)


def attrs(name: str, units: str = "1") -> dict[str, str]:
    return {"long_name": name, "units": units, "method": "made up by the tests"}


def run(kind: str, groups: dict[str, xr.Dataset]) -> xr.DataTree:
    assert nsp.experiments.accessor is not None
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {"kind": kind, "model": {"name": "tiny"}, "recipe_resolved": {"components": []}}
    return tree


def patching(pairs: int = 4, layers: int = 3) -> xr.DataTree:
    """Residual effects by position and head effects of one position, of pairs with the same tokens; one cell missing."""
    texts = np.array([TOKENS] * pairs, dtype=object)
    coords = {"pair": np.arange(pairs), "layer": np.arange(layers) + 5}
    resid = RANDOM.normal(size=(pairs, layers, 4))
    resid[:, 1, 2] = np.nan
    resid[..., 3] = np.nan  # the padding
    dims, heads = ("pair", "layer", "position"), ("pair", "layer", "head")
    tokens = {"position": np.arange(4), "token_text": (("pair", "position"), texts)}
    effect = attrs("normalised effect")
    z = xr.Dataset({"effect": (heads, 5 * RANDOM.normal(size=(pairs, layers, 2)), effect)}, {**coords, "head": [0, 1]})
    return run(
        "activation-patching",
        {"effects/resid_post": xr.Dataset({"effect": (dims, resid, effect)}, {**coords, **tokens}), "effects/z": z},
    )


def lens() -> xr.DataTree:
    probs = np.sort(RANDOM.uniform(size=(2, 3, 4, 2)), axis=-1)[..., ::-1].copy()
    probs[:, :, 3] = np.nan
    words = np.array([f" w{number}" for number in range(probs.size)], dtype=object).reshape(probs.shape)
    words[0, 0, 0, 0] = "<i>"
    coords = {"prompt": [0, 1], "layer": [0, 4, 8], "position": np.arange(4), "token": [0, 1]}
    dims = ("prompt", "layer", "position", "token")
    top = xr.Dataset({"token_prob": (dims, probs, attrs("p")), "token_text": (dims, words, attrs("t"))}, coords)
    texts = (("prompt", "position"), np.array([TOKENS, TOKENS], dtype=object), attrs("tokens"))
    inputs = xr.Dataset({"token_text": texts}, {"prompt": [0, 1], "position": np.arange(4)})
    return run("lens", {"effects/top": top, "inputs": inputs})


def patchscope() -> xr.DataTree:
    dims = ("prompt", "layer", "target_layer")
    coords = {
        "prompt": np.arange(4), "layer": [0, 2, 4], "target_layer": [1, 3],
        "source": ("prompt", np.array(["a", "a", "b", "c"], dtype=object)),
        "template": ("prompt", np.array(["x", "y", "x", "x"], dtype=object)),
    }  # fmt: skip
    found = {}
    for number, variant in enumerate(("patch", "random")):
        match = np.random.default_rng(number).integers(0, 3, size=(4, 3, 2)).astype(np.int8)
        match[:, 0, 1] = -1
        found[f"effects/{variant}"] = xr.Dataset({"match": (dims, match, attrs("match"))}, coords)
    found["baseline"] = found["effects/patch"].isel(layer=0, target_layer=0, drop=True)
    return run("patchscope", found)


def steering() -> xr.DataTree:
    coords: dict[str, Any] = {
        "prompt": np.arange(3), "direction": [0, 1, 2], "multiplier": ("direction", np.array([2.0, 0.0, -2.0])),
    }  # fmt: skip
    dims = ("prompt", "direction")
    kl = RANDOM.uniform(size=(3, 3))
    perplexity = RANDOM.uniform(size=(3, 3))
    perplexity[:, 2] = np.nan
    prob = xr.Dataset(
        {"prob": ((*dims, "token"), RANDOM.uniform(size=(3, 3, 2)), attrs("probability"))},
        {**coords, "token_text": ("token", np.array([" good", " bad"], dtype=object)), "token": [0, 1]},
    )
    texts = {"perplexity": (dims, perplexity, attrs("perplexity")), "repetition": (dims, kl / 2, attrs("repeated"))}
    return run(
        "steering",
        {
            "effects/next_token": xr.Dataset({"kl": (dims, kl, attrs("divergence", "nats"))}, coords),
            "effects/tokens": prob,
            "generations": xr.Dataset(texts, coords),
        },
    )


def bias_scan(pairs: int = 6) -> xr.DataTree:
    rows = 2 * pairs
    kinds = np.repeat(np.array(["age", "gender"] * (pairs // 2), dtype=object), 2)
    inputs = {
        "pair_number": (("prompt",), np.repeat(np.arange(pairs), 2), attrs("pair")),
        "side": (("prompt",), np.array(["less", "more"] * pairs, dtype=object), attrs("side")),
        "bias_type": (("prompt",), kinds, attrs("type")),
    }
    names = ("logprob_aligned", "logprob_base", "kl")
    baseline = {name: (("prompt",), -20 * RANDOM.uniform(size=rows), attrs(name, "nats")) for name in names}
    ablation = xr.Dataset({"logprob": (("prompt",), np.full(rows, np.nan), attrs("log-probability", "nats"))})
    return run(
        "bias-scan",
        {"inputs": xr.Dataset(inputs), "baseline": xr.Dataset(baseline), "effects/ablation": ablation},
    )


def capture() -> xr.DataTree:
    dims, shape = ("prompt", "layer", "neuron"), (3, 2, 40)
    mean = RANDOM.normal(size=shape)
    one = {
        "mean": (dims, mean, attrs("mean", "activation")),
        "mean_square": (dims, mean**2 + 1, attrs("mean square", "activation^2")),
        "max": (dims, mean + 3, attrs("maximum", "activation")),
        "max_position": (dims, np.zeros(shape, dtype=np.int32), attrs("position")),
    }
    coords = {"prompt": np.arange(3), "layer": [3, 7], "neuron": np.arange(40)}
    inputs = xr.Dataset({"n_tokens": (("prompt",), np.array([4, 6, 2]), attrs("tokens"))}, {"prompt": np.arange(3)})
    return run("capture", {"activations/mlp_neurons": xr.Dataset(one, coords), "inputs": inputs})


RUNS = {"heatmap": patching, "bars": patching, "lens": lens, "patchscope": patchscope, "steering": steering}
RUNS |= {"pair-gaps": bias_scan, "capture": capture}


def title(axes: Any) -> str:
    return str(axes.get_title(loc="left")).replace("\n", " ")


def filled(axes: Any) -> np.ndarray:
    found: np.ndarray = np.ma.filled(axes.images[0].get_array(), np.nan)
    return found


@pytest.mark.parametrize("what", list(RUNS))
def test_every_figure_is_drawn_in_both_ways_and_to_every_format(what: str, tmp_path: Path) -> None:
    picture = picture_of(RUNS[what](), what)
    figure, interactive = draw(picture), draw(picture, interactive=True)
    assert isinstance(figure, Figure)
    assert isinstance(interactive, go.Figure)
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending)
        assert buffer.getvalue().startswith(start)
    text = interactive.to_html(include_plotlyjs=False)
    assert "tiny" in text
    assert "<b>Mary" not in text  # tokens are text


def test_heatmaps_of_several_components_share_one_scale_and_one_colour_bar() -> None:
    tree = patching()
    names = ["resid_post", "z"]
    figure = tree.nsp.plot(component=names, pair=1)
    values = [tree[f"effects/{name}"]["effect"].values[1] for name in names]
    reach = float(np.nanmax(np.abs(np.concatenate([part.ravel() for part in values]))))
    for axes, expected in zip(figure.axes, values, strict=False):
        np.testing.assert_array_equal(filled(axes), expected[:, :3])
        norm = axes.images[0].norm
        assert (norm.vcenter, norm.vmin, norm.vmax) == pytest.approx((0, -reach, reach))
    assert [title(axes).split(" pair")[0] for axes in figure.axes[:2]] == names
    assert len(figure.axes) == 3  # and one colour bar
    assert figure.axes[2].get_ylabel() == "normalised effect"
    interactive = tree.nsp.plot(component=names, pair=1, interactive=True)
    axis = interactive.layout.coloraxis
    assert {trace.coloraxis for trace in interactive.data} == {"coloraxis"}
    assert (axis.cmid, axis.cmin, axis.cmax) == pytest.approx((0, -reach, reach))


def test_an_interactive_heatmap_has_the_values_the_tokens_and_gaps() -> None:
    tree = patching()
    values = tree["effects/resid_post"]["effect"]
    figure = tree.nsp.plot(component="resid_post", pair="mean", interactive=True)
    (trace,) = figure.data
    found = mean_effects(values, resamples=1000)
    np.testing.assert_allclose(trace.z, found["mean"].values[:, :3])
    assert np.isnan(trace.z[1, 2])
    low, high = (float(found[name].values[0, 1]) for name in ("low", "high"))
    told = str(trace.customdata[0][1])
    assert told.startswith("layer 5, position ␣&lt;b&gt;Mary 1<br>")
    assert told.endswith(f"interval {low:.4g} to {high:.4g}")
    assert trace.customdata[1][2].endswith("no value")
    assert figure.layout.xaxis.ticktext == ("When 0", "␣&lt;b&gt;Mary 1", "␣went 2")
    assert "mean of 4 pairs, grey: no value" in figure.layout.annotations[0].text
    assert figure.layout.shapes[0].fillcolor == "#d9d9d9"  # what shows where there is no value


def test_the_mean_is_drawn_with_n_and_refused_where_tokens_differ() -> None:
    tree = patching()
    axes = tree.nsp.plot(component="resid_post", pair="mean").axes[0]
    np.testing.assert_allclose(filled(axes), tree["effects/resid_post"]["effect"].mean("pair").values[:, :3])
    assert "mean of 4 pairs" in title(axes)
    texts = np.array([TOKENS, ["a", "b", "c", ""]], dtype=object)
    data = (
        tree["effects/resid_post"]
        .to_dataset()
        .isel(pair=[0, 1])
        .assign_coords(token_text=(("pair", "position"), texts))
    )
    with pytest.raises(InputError, match="their tokens differ; draw one with --pair"):
        data.rename(pair="prompt").nsp.plot(pair="mean")


def test_interactive_bars_have_the_means_and_their_ends() -> None:
    tree = patching()
    static = tree.nsp.plot("bars", component="z").axes[0]
    figure = tree.nsp.plot("bars", component="z", interactive=True)
    found = mean_effects(tree["effects/z"]["effect"])
    best = np.abs(found["mean"].values).argmax(axis=1)
    rows = np.arange(3)
    mean, low, high = (found[name].values[rows, best] for name in ("mean", "low", "high"))
    (bars,) = figure.data
    np.testing.assert_allclose(bars.y, mean)
    np.testing.assert_allclose([bar.get_height() for bar in static.containers[0]], mean)
    np.testing.assert_allclose(bars.error_y.array, high - mean)
    np.testing.assert_allclose(bars.error_y.arrayminus, mean - low)
    assert bars.customdata[0].startswith(f"layer 5, head {best[0]}<br>")


def test_a_lens_grid_has_the_top_token_in_each_cell() -> None:
    tree = lens()
    top = tree["effects/top"].to_dataset().isel(prompt=1)
    figure = tree.nsp.plot(pair=1)  # the figure that suits the run
    axes = figure.axes[0]
    np.testing.assert_array_equal(filled(axes), top["token_prob"].values[:, :3, 0])
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(cells) == 9
    assert cells[2, 1] == str(top["token_text"].values[1, 2, 0]).replace(" ", "␣")
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "4", "8"]
    assert "prompt 1 of 2" in title(axes)
    (trace,) = tree.nsp.plot("lens", pair=0, interactive=True).data
    assert trace.text[0][0] == "&lt;i&gt;"
    second = tree["effects/top"].isel(prompt=0, layer=0, position=0)
    assert f"{float(second['token_prob'][1]):.3f}" in trace.customdata[0][0]
    for pair, message in (("mean", "have no mean"), (2, "there is no prompt 2; the store has 0 to 1")):
        with pytest.raises(InputError, match=message):
            tree.nsp.plot(pair=pair)


def test_a_patchscope_grid_has_the_success_of_patch_and_control() -> None:
    tree = patchscope()
    rates = success_rates(tree)
    figure = tree.nsp.plot()
    for axes, name in zip(figure.axes, ("rate", "random"), strict=False):
        np.testing.assert_array_equal(filled(axes), rates[name].values)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("target layer", "source layer")
        norm = axes.images[0].norm
        assert (norm.vmin, norm.vmax) == (0, 1)
    assert np.isnan(filled(figure.axes[0])[0, 1])
    assert "n = 0 to 3 sources; without a patch" in title(figure.axes[0])
    assert "hatched: no value" in title(figure.axes[0])
    interactive = tree.nsp.plot(interactive=True)
    np.testing.assert_array_equal(interactive.data[0].z, rates["rate"].values)
    low, high = float(rates["low"][1, 0]), float(rates["high"][1, 0])
    assert f"interval {low:.4g} to {high:.4g}" in interactive.data[0].customdata[1][0]
    empty = tree.copy(deep=True)
    for group in ("effects/patch", "effects/random", "baseline"):
        empty[group]["match"][...] = -1
    with pytest.raises(InputError, match="no text of this run was judged"):
        empty.nsp.plot()


def test_a_steering_sweep_has_means_by_multiplier_with_bands() -> None:
    tree = steering()
    figure = tree.nsp.plot()
    assert [title(axes).split(" mean of")[0] for axes in figure.axes] == [
        "next token", "tokens followed", "perplexity of the texts", "repetition of the texts",
    ]  # fmt: skip
    kl = mean_effects(tree["effects/next_token"]["kl"].rename(prompt="pair").reset_coords(drop=True))
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [-2, 0, 2])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), kl["mean"].values[::-1])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((float(kl["low"].min()), float(kl["high"].max())))
    assert axes.get_ylabel() == "divergence [nats]"
    assert "mean of 3 prompts, 95 % interval" in title(axes)
    assert [line.get_label() for line in figure.axes[1].lines] == ["␣good", "␣bad"]
    assert np.isnan(figure.axes[2].lines[0].get_ydata()[0])  # no text at -2: a gap, not 0
    lines = [trace for trace in tree.nsp.plot(interactive=True).data if trace.mode == "lines+markers"]
    np.testing.assert_allclose(lines[0].y, kl["mean"].values[::-1])
    np.testing.assert_allclose(lines[1].y, tree["effects/tokens"]["prob"].mean("prompt").values[::-1, 0])


def test_pair_gaps_have_every_pair_by_type_and_model() -> None:
    tree = bias_scan()
    base = tree["baseline"].to_dataset()
    gaps = {
        name: base[f"logprob_{name}"].values[1::2] - base[f"logprob_{name}"].values[::2] for name in ("aligned", "base")
    }
    axes = tree.nsp.plot().axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["all  (n = 6)", "age  (n = 3)", "gender  (n = 3)"]
    assert axes.get_xlabel().endswith("[nats]")
    clouds = [np.sort(item.get_offsets()[:, 0]) for item in axes.collections if isinstance(item, PathCollection)]
    expected = [part for gap in gaps.values() for part in (gap, gap[::2], gap[1::2])]
    for cloud, values in zip(clouds, expected, strict=True):  # the ablated model has no values, so no points
        np.testing.assert_allclose(cloud, np.sort(values))
    assert "18 not computed" not in title(axes)
    assert "6 not computed" in title(axes)
    aligned, plain, ablated = tree.nsp.plot(interactive=True).data
    np.testing.assert_allclose(aligned.x[0], gaps["aligned"])
    assert aligned.median[1] == pytest.approx(np.median(gaps["aligned"][::2]))
    assert plain.y == ("all  (n = 6)", "age  (n = 3)", "gender  (n = 3)")
    assert not ablated.x


def test_capture_summaries_have_the_spread_over_units() -> None:
    tree = capture()
    found = unit_statistics(tree, "mlp_neurons")
    figure = tree.nsp.plot()
    mean, std, largest = figure.axes
    np.testing.assert_allclose(mean.lines[0].get_ydata(), found["mean"].median("neuron"))
    np.testing.assert_allclose(largest.lines[1].get_ydata(), found["max"].max("neuron"))
    np.testing.assert_array_equal(std.lines[0].get_xdata(), [3, 7])
    band = std.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(float(found["std"].quantile(0.95, "neuron").max()))
    assert "n = 40 units a layer, over 12 tokens" in title(mean)
    assert mean.get_ylabel() == "mean of a unit [activation]"
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "log"]
    lines = [trace for trace in tree.nsp.plot(interactive=True).data if trace.mode == "lines+markers"]
    np.testing.assert_allclose(lines[-1].y, found["max"].max("neuron"))


def test_the_five_numbers_of_a_box_leave_nan_out() -> None:
    values = np.array([0.0, 1, 2, 3, 4, np.nan])
    assert five_numbers(values) == (0.2, 1.0, 2.0, 3.0, 3.8)


def test_each_run_names_its_figure_and_says_which_it_cannot_give() -> None:
    assert {named(make())[0].what for make in RUNS.values()} == {
        "heatmap",
        "lens",
        "patchscope",
        "steering",
        "pair-gaps",
        "capture",
    }
    assert set(RUNS) | {"scatter", "faithfulness", "lines"} == set(WHAT)
    with pytest.raises(InputError, match="is of a lens run; this is one of steering, which has steering: try 'steering'"):
        drawable(steering(), "lens")
    with pytest.raises(InputError, match="an attribution run with circuits; this is one of activation-patching, which has heatmap, bars"):
        drawable(patching(), "faithfulness")
    with pytest.raises(InputError, match="did you mean 'patchscope'"):
        drawable(patching(), "patchscopes")


def test_without_plotly_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nsp.report.drawing.plotly", raising=False)
    monkeypatch.delattr("nsp.report.drawing.plotly", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'nsp\[plotly\]'"):
        patching().nsp.plot(interactive=True)


def test_a_large_interactive_grid_keeps_readable_labels() -> None:
    shown = grid(np.ones((40, 60)), tuple(f"token{number} {number}" for number in range(60)))
    figure = draw(Picture("", (("", shown),)), interactive=True)
    assert figure.layout.height >= 40 * 15
    assert len(figure.layout.xaxis.ticktext) == 60
    assert figure.layout.xaxis.tickangle == -90


# The terminal


def grid(values: Any, columns: tuple[str, ...], reach: float = 1.0) -> Grid:
    array = np.array(values, dtype=float)
    rows = tuple(str(number) for number in range(len(array)))
    return Grid(
        values=array, rows=rows, columns=columns, y="layer", x="position", meaning="effect", scale=Scale(-reach, reach)
    )


def test_a_terminal_grid_carries_its_values_in_characters() -> None:
    shown = grid([[0.01, -1.0, np.nan], [1.0, 0.5, -0.34]], ("When 0", "␣a 1", "␣b 2"))
    lines = text_grid(shown, "title", 80).plain.splitlines()
    assert lines[:4] == ["title", "    1  9 4-3", "    0  .-9 /", "layer  0 1 2"]
    assert lines[4] == "positions: 0 When, 1 ␣a, 2 ␣b"
    assert lines[5] == "9 is 1, - below, . about none, / no value"


def test_a_terminal_grid_fits_the_width_by_folding_to_the_strongest() -> None:
    values = np.linspace(0, 0.5, 60)[None].repeat(40, axis=0)
    values[7, 31] = -1.0
    shown = grid(values, tuple(str(number) for number in range(60)))
    lines = text_grid(shown, "title", 40).plain.splitlines()
    assert max(map(len, lines[: 1 + 40 + 1])) <= 40
    assert [line for line in lines if "-9" in line] == [lines[1 + 39 - 7]]
    assert "a cell is the strongest of 4 positions" in lines[-1]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_colour_the_characters_are_the_same(environment: dict[str, str]) -> None:
    text = text_grid(grid([[1.0, -0.5]], ("0", "1")), "title", 80)

    def printed(colour: str | None, environ: dict[str, str]) -> str:
        stream = io.StringIO()
        terminal = colour is not None
        Console(file=stream, force_terminal=terminal, color_system=colour, width=80, _environ=environ).print(text)  # type: ignore[arg-type]
        return stream.getvalue()

    assert "\x1b[" in printed("truecolor", {})
    plain = printed(None, environment)
    assert "\x1b" not in plain
    assert "    0  9-4" in plain


def test_a_terminal_without_the_characters_gets_escapes() -> None:
    text = text_grid(grid([[1.0]], ("␣日 0",)), "τ", 80, "ascii").plain
    assert text.isascii()
    assert "0 _\\u65e5" in text


def test_small_heatmaps_are_of_the_main_effects_by_layer() -> None:
    tree = patching()
    found = small_heatmaps(tree)
    assert list(found) == ["resid_post", "z"]
    assert isinstance(found["z"], Grid)
    np.testing.assert_allclose(found["z"].values, tree["effects/z"]["effect"].mean("pair").values)
    assert small_heatmaps(steering()) == {}
    assert small_heatmaps(capture()) == {}


def test_show_draws_the_figure_that_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tree = steering()
    monkeypatch.setattr("nsp.cli.show.open_tree", lambda store: tree)
    monkeypatch.setattr("nsp.experiments.finished.summary", lambda tree, store: Summary("steering"))
    assert main(["show", "runs/x.zarr", "--what", "steering"]) == 0
    text = capsys.readouterr().out
    assert "tokens followed: probability, mean of 3 prompts, 95 % interval" in text
    assert "multiplier" in text
    assert main(["show", "runs/x.zarr", "--what", "lens"]) == 2
    assert "is of a lens run" in capsys.readouterr().err


def test_the_command_draws_what_its_options_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = patching()
    monkeypatch.setattr("nsp.cli.plot.open_tree", lambda store: tree)
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "runs/x.zarr", "-o", "x.html", "--pair", "mean"]) == 0
    page = Path("x.html").read_text(encoding="utf-8")
    assert page.count("mean of 4 pairs") == 2  # a panel a component
    assert "src=" not in page.split("<body>")[1].split("<script")[1][:200]
    assert "cdn.plot.ly" not in page.partition("Plotly.newPlot")[2]
    assert main(["plot", "runs/x.zarr", "--what", "bars"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["x-resid_post-bars.png", "x-z-bars.png"]
    assert main(["plot", "runs/x.zarr", "--what", "lens"]) == 2
    assert "is of a lens run" in capsys.readouterr().err
    monkeypatch.setattr("nsp.cli.plot.open_tree", lambda store: lens())
    assert main(["plot", "runs/lens.zarr"]) == 0
    assert Path("runs/lens-lens.png").exists()
