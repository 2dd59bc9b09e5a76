"""What each intervention writes: operands, draws, donors, functions of one's own, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, HEADS, WIDTH, Both, both, model, one_thread, text  # noqa: F401

import nsp
from nsp.interventions import Inject, Patch

PATHS = ("branch", "plain")
FIRST = [[3, 9, 27, 8, 40, 1], [2, 4, 8, 16, 32, 3, 6, 12, 24], [50, 7]]
EQUAL = [[3, 9, 27, 8, 40, 1, 2, 3, 4], [2, 4, 8, 16, 32, 3, 6, 12, 24]]


@pytest.fixture(params=["llama", "gpt2"])
def pair_of(request: pytest.FixtureRequest) -> Both:
    return both(request.param)


def written(of: nsp.Model, site: str, *interventions: Any, prompt: Any = CORRUPT) -> xr.DataArray:
    """What stands at a site after the interventions, in one counterfactual."""
    with of.trace(prompt) as t:
        t.add(*interventions)
        t.record(site)
    return t.results[nsp.Site.parse(site).component]


def logit(of: nsp.Model, *interventions: Any, prompt: Any = CORRUPT, path: str = "plain", axes: Any = None) -> Any:
    """The logit of token 4, of one counterfactual, or of a sweep with axes."""
    with of.trace(prompt, path=path) as t:  # type: ignore[arg-type]
        if axes is None:
            t.add(*interventions)
        else:
            t.sweep(*interventions, axes=axes)
        t.measure(nsp.logit(4))
    return t.results["logit"].values


# Ablations


@pytest.mark.parametrize("name", ["resid_post", "attn_out", "z", "mlp_neurons", "k"])
def test_mean_ablation_over_tokens_weighs_every_real_token_alike(pair_of: Both, name: str) -> None:
    """References of different lengths: padding enters no mean, and a long prompt counts for more."""
    kept = [pair_of.reference.values(ids, [(name, 1)])[name, 1] for ids in FIRST]
    mean = torch.cat(kept).mean(dim=0).reshape(-1)
    found = written(pair_of.model, f"{name}[1] @ 3,5", nsp.ablate(f"{name}[1] @ 3,5", "mean", reference=FIRST))
    for position in (3, 5):
        value = found.sel(layer=1, position=position).values.reshape(-1)
        np.testing.assert_allclose(value, mean, atol=1e-5)


def test_mean_ablation_over_prompts_is_taken_at_each_position(pair_of: Both) -> None:
    kept = [pair_of.reference.values(ids, [("mlp_out", 2)])["mlp_out", 2] for ids in EQUAL]
    mean = torch.stack(kept).mean(dim=0)[:, 0]
    ablation = nsp.ablate("mlp_out[2] @ *", "mean", reference=EQUAL, over="prompts")
    found = written(pair_of.model, "mlp_out[2]", ablation)
    np.testing.assert_allclose(found.sel(layer=2), mean, atol=1e-5)


@pytest.mark.parametrize("over", ["tokens", "prompts"])
def test_resampling_draws_values_of_the_references(pair_of: Both, over: Any) -> None:
    prompts = EQUAL if over == "prompts" else FIRST
    kept = [pair_of.reference.values(ids, [("attn_out", 1)])["attn_out", 1][:, 0] for ids in prompts]

    def draw(seed: int) -> np.ndarray:
        ablation = nsp.ablate("attn_out[1] @ *", "resample", reference=prompts, over=over, seed=seed)
        return np.asarray(written(pair_of.model, "attn_out[1]", ablation).sel(layer=1).values)

    draws = [draw(seed) for seed in range(4)]
    for value, position in itertools.product(draws, range(len(CORRUPT))):
        pool = torch.cat([one[position : position + 1] if over == "prompts" else one for one in kept])
        assert np.abs(pool.numpy() - value[position]).max(axis=1).min() < 1e-5
    np.testing.assert_array_equal(draw(0), draws[0])
    assert any((draws[0] != other).any() for other in draws[1:])


def test_references_of_another_length_are_refused_position_by_position(pair_of: Both) -> None:
    ablation = nsp.ablate("z[1] @ 3", "mean", reference=FIRST, over="prompts")
    t = pair_of.model.trace(CORRUPT)
    t.add(ablation)
    with pytest.raises(nsp.InputError, match="over='tokens'"):
        t.run()


def test_the_neutral_sentences_stand_in_for_references(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    from nsp.datasets.reference import NEUTRAL_SENTENCES

    given = nsp.ablate("mlp_out[10] @ -1", "mean", reference=NEUTRAL_SENTENCES)
    found = [
        written(smollm2, "mlp_out[10] @ -1", ablation, prompt=ioi_pair.corrupt)
        for ablation in (nsp.ablate("mlp_out[10] @ -1", "mean"), given)
    ]
    np.testing.assert_array_equal(*found)
    assert len(NEUTRAL_SENTENCES) >= 10


# Noise


def embedding_deviation(of: nsp.Model) -> float:
    return float(of.module.get_input_embeddings().weight.std())  # type: ignore[attr-defined,operator]


def test_noise_has_the_scale_that_was_asked_for(pair_of: Both) -> None:
    of = pair_of.model
    long = list(range(1, 41))
    plain = written(of, "resid_post[0]", prompt=long)
    added = written(of, "resid_post[0]", nsp.inject("resid_post[0] @ *", nsp.Noise(3.0, seed=5)), prompt=long) - plain
    replaced = written(of, "resid_post[0]", nsp.ablate("resid_post[0] @ *", "noise", scale=2.0, seed=5), prompt=long)
    unit = embedding_deviation(of)
    assert float(added.std()) == pytest.approx(3 * unit, rel=0.06)
    assert abs(float(added.mean())) < 0.3 * unit
    np.testing.assert_allclose(replaced / 2, added / 3, atol=1e-4)  # one seed, one draw
    half = nsp.inject("resid_post[0] @ *", nsp.Noise(3.0, seed=5), coefficient=0.5)
    np.testing.assert_allclose(written(of, "resid_post[0]", half, prompt=long) - plain, added / 2, atol=1e-4)
    # Every position and layer has a draw of its own.
    assert abs(np.corrcoef(added[0].values.reshape(40, -1))[np.triu_indices(40, 1)]).mean() < 0.3


def test_the_seed_decides_the_noise(pair_of: Both) -> None:
    def noise(seed: int) -> xr.DataArray:
        return written(pair_of.model, "z[1]", nsp.ablate("z[1] @ *", "noise", seed=seed))

    xr.testing.assert_identical(noise(1), noise(1))
    assert float(abs(noise(1) - noise(2)).min()) > 0


@pytest.mark.parametrize("kind", ["noise", "resample"])
@pytest.mark.parametrize("width", [WIDTH, 36])
def test_a_draw_is_the_same_in_every_batch(kind: Any, width: int) -> None:
    """Alone, beside a longer prompt, in a sweep of either path, and where only some positions are selected."""
    of = model("llama", hidden_size=width, num_attention_heads=2, num_key_value_heads=2)
    short = CORRUPT[:5]
    ablation = nsp.ablate("resid_post[1] @ *", kind, reference=FIRST, seed=3)
    alone = written(of, "resid_post[1]", ablation, prompt=short).values
    beside = written(of, "resid_post[1]", ablation, prompt=[CORRUPT, short, CLEAN]).values
    np.testing.assert_allclose(beside[1, :, :5], alone, atol=1e-6)
    some = nsp.ablate("resid_post[1] @ 3", kind, reference=FIRST, seed=3)
    np.testing.assert_allclose(
        written(of, "resid_post[1] @ 3", some, prompt=short).values[:, 0], alone[:, 3], atol=1e-6
    )
    single = logit(of, some, prompt=short)
    for path in PATHS:
        swept = logit(of, ablation, prompt=[CORRUPT, short], path=path, axes=("position",))
        np.testing.assert_allclose(swept[1, 3], single, atol=1e-5)


# Inject


def test_inject_a_vector_for_each_position(pair_of: Both) -> None:
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    plain = written(pair_of.model, "resid_post[1] @ 2,5")
    found = written(pair_of.model, "resid_post[1] @ 2,5", nsp.inject("resid_post[1] @ 5,2", vectors, coefficient=2.0))
    np.testing.assert_allclose((found - plain).sel(layer=1), 2 * vectors.flip(0), atol=1e-5)
    found = written(pair_of.model, "resid_post[1] @ 2,5", nsp.inject("resid_post[1] @ 2,5", vectors, mode="set"))
    np.testing.assert_array_equal(found.sel(layer=1), vectors)


@pytest.mark.parametrize("coefficient", [1.0, 0.25, -2.0])
@pytest.mark.parametrize("mode", ["set", "add"])
def test_the_coefficient_scales_the_vector_in_both_modes(pair_of: Both, mode: Any, coefficient: float) -> None:
    vector = torch.linspace(-1, 1, WIDTH)
    plain = written(pair_of.model, "mlp_out[1] @ 4") if mode == "add" else 0.0
    found = written(
        pair_of.model, "mlp_out[1] @ 4", nsp.inject("mlp_out[1] @ 4", vector, mode=mode, coefficient=coefficient)
    )
    np.testing.assert_allclose((found - plain).values.reshape(-1), coefficient * vector, atol=1e-5)


def test_inject_into_one_head_leaves_the_others(pair_of: Both) -> None:
    vector = torch.linspace(1, 2, WIDTH // HEADS)
    plain = written(pair_of.model, "q[1] @ 4").values.reshape(HEADS, -1)
    found = written(pair_of.model, "q[1] @ 4", nsp.inject("q[1][2] @ 4", vector, mode="set")).values.reshape(HEADS, -1)
    np.testing.assert_allclose(found[2], vector, atol=1e-6)
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(plain, 2, 0))


# Functions of one's own


def centred(value: torch.Tensor) -> torch.Tensor:
    return value - value.mean(dim=0, keepdim=True)


@pytest.mark.parametrize("site", ["resid_post[0,1] @ 2,5", "z[0,1][0,3] @ 2,5,7", "mlp_neurons[1][3,7] @ 1,8"])
def test_apply_is_called_once_a_unit_with_all_its_positions(pair_of: Both, site: str) -> None:
    shapes: list[tuple[int, ...]] = []

    def watch(value: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(value.shape))
        return value

    logit(pair_of.model, nsp.apply(site, watch), prompt=[CORRUPT, CLEAN])
    parsed = nsp.Site.parse(site)
    layers, positions = len(parsed.layers.items), len(parsed.positions.items)  # type: ignore[union-attr]
    units = len(parsed.units.items) if parsed.units else 1
    width = {"resid_post": WIDTH, "z": WIDTH // HEADS, "mlp_neurons": 1}[parsed.component]
    assert shapes == [(positions, width)] * (2 * layers * units)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("axes", [("layer",), ("position",), ("layer", "position", "unit")])
def test_a_cell_of_an_apply_sweep_is_the_counterfactual_alone(pair_of: Both, axes: tuple[str, ...], path: str) -> None:
    """A function that looks across positions sees those of its own branch and head, however branches are packed."""
    swept = logit(pair_of.model, nsp.apply("z[0,1][0,3] @ 2,5,7", centred), path=path, axes=axes)
    cells = itertools.product(*({"layer": "01", "position": "257", "unit": "03"}[axis] for axis in axes))
    for place, cell in zip(np.ndindex(swept.shape), cells, strict=True):
        at = dict(zip(axes, cell, strict=True))
        site = f"z[{at.get('layer', '0,1')}][{at.get('unit', '0,3')}] @ {at.get('position', '2,5,7')}"
        np.testing.assert_allclose(swept[place], logit(pair_of.model, nsp.apply(site, centred)), atol=2e-5)


def test_apply_keeps_the_models_dtype() -> None:
    of = model("llama", dtype=torch.bfloat16)
    seen: list[torch.dtype] = []

    def widen(value: torch.Tensor) -> torch.Tensor:
        seen.append(value.dtype)
        return value.double() * 2

    twice = logit(of, nsp.apply("resid_post[1] @ 4", widen))
    assert seen == [torch.bfloat16]
    np.testing.assert_array_equal(twice, logit(of, nsp.scale("resid_post[1] @ 4", 2.0)))


@pytest.mark.parametrize(
    "result",
    [lambda x: x[:, :3], lambda x: x.sum(), lambda _x: None, lambda _x: 1.0],
    ids=["another shape", "a scalar", "nothing", "a number"],
)
@pytest.mark.parametrize("path", PATHS)
def test_apply_must_return_what_it_was_given(result: Callable[[torch.Tensor], Any], path: str) -> None:
    t = both("llama").model.trace(CORRUPT, path=path)  # type: ignore[arg-type]
    t.sweep(nsp.apply("resid_post[1] @ 2", result))
    t.measure(nsp.logit(4))
    with pytest.raises(nsp.InputError, match=r"resid_post\[1\].*shape"):
        t.run()


# Donors


def recorded(of: nsp.Model, *sites: str, prompt: Any = CLEAN) -> Any:
    with of.trace(prompt) as t:
        t.record(*sites)
    return t.results


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name", ["resid_pre", "resid_post", "resid_mid", "attn_out", "z", "q", "k", "v", "mlp_neurons"]
)
def test_a_recording_donates_what_its_prompt_would(pair_of: Both, name: str, path: str) -> None:
    recording = recorded(pair_of.model, f"{name}[*]")[name]
    site = f"{name}[0,2] @ 2,5,8"
    for axes in (("layer", "position"), ("layer",)):
        found = [
            logit(pair_of.model, nsp.patch(site, donor=donor), path=path, axes=axes) for donor in (CLEAN, recording)
        ]
        np.testing.assert_allclose(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize("name", ["z", "k", "pattern", "mlp_neurons"])
def test_donor_recordings_of_some_units(pair_of: Both, name: str) -> None:
    """A recording at the very same selector fits; so does a larger one; one that lacks a unit is refused."""
    site = f"{name}[1][1] @ 4,8"
    want = logit(pair_of.model, nsp.patch(site, donor=CLEAN))
    for selector in (site, f"{name}[1][0,1]", f"{name}[1]"):
        recording = recorded(pair_of.model, selector)[name]
        np.testing.assert_allclose(logit(pair_of.model, nsp.patch(site, donor=recording)), want, atol=1e-5)
    missing = recorded(pair_of.model, f"{name}[1][0]")[name]
    with pytest.raises(nsp.InputError, match=r"\b1\b"):
        logit(pair_of.model, nsp.patch(site, donor=missing))


def test_a_recording_is_matched_by_its_labels(pair_of: Both) -> None:
    """Layers and positions by coordinate, in whatever order and company they come."""
    recording = recorded(pair_of.model, "resid_post[*]")["resid_post"]
    want = logit(pair_of.model, nsp.patch("resid_post[1] @ 5", donor=CLEAN))
    turned = recording.isel(layer=[2, 1], position=[8, 5, 2]).transpose("position", "neuron", "layer")
    np.testing.assert_allclose(logit(pair_of.model, nsp.patch("resid_post[1] @ 5", donor=turned)), want, atol=1e-5)
    point = recording.sel(layer=1, position=5)
    np.testing.assert_allclose(logit(pair_of.model, nsp.patch("resid_post[1] @ 5", donor=point)), want, atol=1e-5)
    for donor, lacking in ((recording.sel(layer=[0]), "layer 1"), (recording.isel(position=[0, 1]), "position 5")):
        with pytest.raises(nsp.InputError, match=lacking):
            logit(pair_of.model, nsp.patch("resid_post[1] @ 5", donor=donor))


def test_one_prompt_of_a_recorded_batch_keeps_its_positions(pair_of: Both) -> None:
    """Spans at different places: the recording's ``position`` counts places, but a patch goes by tokens."""
    prompts = [text([1, 2, 40, 3, 4]), text([40, 1, 2, 3, 4])]
    with pair_of.model.trace(prompts, spans={"it": "w40"}) as t:
        t.record("resid_post[1] @ it")
    recording = t.results["resid_post"].isel(prompt=0)
    other = text([9, 9, 9, 9, 9])
    want = logit(pair_of.model, nsp.patch("resid_post[1] @ 2", donor=prompts[0]), prompt=other)
    found = logit(pair_of.model, nsp.patch("resid_post[1] @ 2", donor=recording), prompt=other)
    np.testing.assert_allclose(found, want, atol=1e-5)
    with pytest.raises(nsp.InputError, match="position 0"):
        logit(pair_of.model, nsp.patch("resid_post[1] @ 0", donor=recording), prompt=other)


def test_another_model_of_equal_width_can_donate(pair_of: Both) -> None:
    other = both("gpt2" if pair_of.family == "llama" else "llama")
    recording = recorded(other.model, "resid_post[*]")["resid_post"]
    found = logit(pair_of.model, nsp.patch("resid_post[1] @ 4", donor=recording))
    by_tensor = logit(
        pair_of.model, nsp.patch("resid_post[1] @ 4", donor=torch.tensor(recording.sel(layer=1, position=4).values))
    )
    np.testing.assert_array_equal(found, by_tensor)
    narrow = recorded(model("llama", hidden_size=16, num_attention_heads=2, num_key_value_heads=1), "resid_post[*]")
    with pytest.raises(nsp.InputError, match="16"):
        logit(pair_of.model, nsp.patch("resid_post[1] @ 4", donor=narrow["resid_post"]))


def test_a_tensor_is_one_value_or_one_a_position(pair_of: Both) -> None:
    values = torch.tensor(recorded(pair_of.model, "resid_post[1] @ 2,5")["resid_post"].values[0])
    want = logit(pair_of.model, nsp.patch("resid_post[1] @ 2,5", donor=CLEAN))
    for donor in (values, values[None], values.double()):
        np.testing.assert_allclose(logit(pair_of.model, nsp.patch("resid_post[1] @ 2,5", donor=donor)), want, atol=1e-5)
    for donor in (values[:, :5], values[:1], torch.zeros(3, WIDTH), torch.tensor(1.0)):
        with pytest.raises(nsp.InputError, match=r"resid_post\[1\] @ 2,5"):
            logit(pair_of.model, nsp.patch("resid_post[1] @ 2,5", donor=donor))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_donor_that_is_not_finite_is_reported(bad: float) -> None:
    donor = torch.full((WIDTH,), bad)
    with pytest.warns(RuntimeWarning, match="NaN"):
        assert not np.isfinite(logit(both("llama").model, nsp.patch("resid_post[1] @ 2", donor=donor)))


def test_a_trace_is_no_donor_but_its_recording_is() -> None:
    of = both("llama").model
    with of.trace(CLEAN) as t:
        t.record("resid_post[1]", "z[1]")
    for donor in (t, t.results):
        with pytest.raises(nsp.InputError, match=r"recorded|recording"):
            logit(of, nsp.patch("resid_post[1] @ 2", donor=donor))


# What cannot be stated


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (lambda: nsp.patch("resid_post[1]", donor=None), "donor"),
        (lambda: nsp.patch("logits @ 1", donor=CLEAN), "logits"),
        (lambda: nsp.patch("resid_pots[1]", donor=CLEAN), "resid_post"),
        (lambda: nsp.inject("resid_post[1]", [1.0], mode="multiply"), "'add' or 'set'"),
        (lambda: nsp.inject("resid_post[1]", [float("nan")]), "NaN"),
        (lambda: nsp.ablate("z[1]", "median"), "zero, mean, resample, noise"),
        (lambda: nsp.ablate("z[1]", "mean", over="layers"), "'tokens' or 'prompts'"),
        (lambda: nsp.ablate("z[1]", "mean", reference=[]), "empty"),
        (lambda: nsp.apply("z[1]", "sin"), "function"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_it_is_stated(stated: Callable[[], Any], message: str) -> None:
    with pytest.raises(nsp.InputError, match=message):
        stated()


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (nsp.scale("z[3] @ 1", 0.0), "0 to 2"),
        (nsp.scale("z[1][4] @ 1", 0.0), "0 to 3"),
        (nsp.scale("k[1][2] @ 1", 0.0), "0 to 1"),
        (nsp.scale("mlp_neurons[1][48] @ 1", 0.0), "0 to 47"),
        (nsp.scale("z[1] @ 9", 0.0), "0 to 8"),
        (nsp.scale("z[1] @ subject", 0.0), "subject"),
        (nsp.scale("module:model.layers.7.mlp @ 1", 0.0), "no submodule"),
        (nsp.scale("module:model.norm @ 1", 0.0), "inside a layer"),
        (nsp.scale("module:model.layers.1 @ 1", 0.0), "resid_post"),
        (nsp.inject("z[1][0] @ 1", torch.ones(WIDTH)), r"\(8,\)"),
        (nsp.ablate("pattern[1] @ 1", "mean", reference=FIRST), "pattern"),
        (nsp.ablate("pattern[1] @ 1", "noise"), "pattern"),
        (nsp.patch("resid_post[1] @ 1", donor=CLEAN[:7]), "lengths differ"),
        (nsp.patch("resid_post[1] @ 1", donor=[1, 2, 61, 4, 5, 6, 7, 8, 9]), "61"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_runs(intervention: Any, message: str) -> None:
    with pytest.raises(nsp.InputError, match=message):
        logit(both("llama").model, intervention)


def test_gpt2_says_why_it_has_no_gate() -> None:
    with pytest.raises(nsp.InputError, match="not gated"):
        logit(both("gpt2").model, nsp.scale("mlp_gate[1] @ 1", 0.0))


def test_interventions_are_frozen_values() -> None:
    patch = nsp.patch("resid_post[1] @ 2", donor=CLEAN)
    with pytest.raises(AttributeError):
        patch.donor = CORRUPT  # type: ignore[misc]
    assert isinstance(patch, Patch)
    assert isinstance(nsp.inject("z[1]", [1.0, 2.0]), Inject)


def test_a_statement_keeps_its_own_values() -> None:
    """A vector that is changed after it was stated (as in a loop that reuses a buffer) must not change the run."""
    of = both("llama").model
    for stated in (lambda v: nsp.inject("resid_post[1] @ 4", v), lambda v: nsp.patch("resid_post[1] @ 4", donor=v)):
        vector = torch.linspace(-1, 1, WIDTH)
        want = logit(of, stated(vector.clone()))
        with of.trace(CORRUPT) as t:
            t.add(stated(vector))
            vector.fill_(3.0)
            t.measure(nsp.logit(4))
        assert float(t.results["logit"]) == float(want)
    ids = list(CLEAN)
    t = of.trace(CORRUPT)
    t.patch("resid_post[1] @ 4", donor=ids)
    ids[0] = 9
    t.measure(nsp.logit(4))
    t.run()
    assert float(t.results["logit"]) == float(logit(of, nsp.patch("resid_post[1] @ 4", donor=CLEAN)))
