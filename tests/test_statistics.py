"""Statistics over pairs: agreement with scipy, error rates on synthetic data, and what is no evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from nsp.errors import InputError
from nsp.statistics import (
    average_pairs,
    matched_null,
    mean_effects,
    random_sites,
    sign_flip_test,
    sign_flip_tests,
    split_half,
    split_pairs,
)

QUICK = settings(max_examples=40, deadline=None)


def effects(values: Any, *dims: str) -> xr.DataArray:
    values = np.asarray(values, dtype=np.float32)
    dims = ("pair", *(dims or ("layer", "head")[: values.ndim - 1]))
    coords = {dim: np.arange(size) for dim, size in zip(dims, values.shape, strict=True)}
    return xr.DataArray(values, coords, dims, attrs={"units": "logit", "long_name": "effect of a patch"})


def noise(seed: int, *shape: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, shape).astype(np.float32)


small_tables = hnp.arrays(
    np.float32, st.tuples(st.integers(2, 7), st.integers(1, 6)), elements=st.integers(-4, 4).map(float)
)


# --- sign-flip tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_p_agrees_with_scipy(seed: int) -> None:
    values = np.round(4 * noise(seed, 7, 5)) / 4  # whole quarters: flips tie exactly
    ours = sign_flip_test(effects(values), correction="none")["p"].values
    found = stats.permutation_test(
        (values.astype(np.float64),), np.mean, permutation_type="samples", vectorized=True, n_resamples=np.inf, axis=0
    )
    np.testing.assert_allclose(ours, found.pvalue, rtol=1e-6)


def test_drawn_flips_agree_with_all_flips() -> None:
    effect = effects(noise(1, 10, 6, shift=0.5))
    exact, drawn = sign_flip_test(effect), sign_flip_test(effect, resamples=500)
    assert (exact.attrs["exact"], exact.attrs["flips"]) == (1, 1024)
    assert (drawn.attrs["exact"], drawn.attrs["flips"]) == (0, 500)
    for key in ("p", "p_corrected"):
        np.testing.assert_allclose(drawn[key], exact[key], atol=0.07)
    assert float(drawn["p"].min()) >= 1 / 501


def test_max_t_by_enumeration() -> None:
    values = noise(3, 6, 4, shift=0.7).astype(np.float64)
    flips = 1 - 2 * ((np.arange(64)[:, None] >> np.arange(6)) & 1)
    t = np.abs(np.array([stats.ttest_1samp(flip[:, None] * values, 0).statistic for flip in flips]))
    largest = t.max(axis=1)
    expected = [(largest >= one - 1e-9).mean() for one in np.abs(stats.ttest_1samp(values, 0).statistic)]
    np.testing.assert_allclose(sign_flip_test(effects(values))["p_corrected"], expected)


@pytest.mark.parametrize("correction", ["bh", "by"])
def test_false_discovery_corrections(correction: Any) -> None:
    found = sign_flip_test(effects(noise(2, 8, 3, 4, shift=0.6)), correction=correction)
    p = found["p"].values.reshape(-1)
    np.testing.assert_allclose(
        found["p_corrected"].values.reshape(-1), stats.false_discovery_control(p, method=correction)
    )
    order, m = np.argsort(p), p.size
    scale = m * (sum(1 / np.arange(1, m + 1)) if correction == "by" else 1)
    by_hand = np.minimum.accumulate((p[order] * scale / np.arange(1, m + 1))[::-1])[::-1]
    np.testing.assert_allclose(found["p_corrected"].values.reshape(-1)[order], np.minimum(by_hand, 1))


@QUICK
@given(small_tables, st.sampled_from(["max-t", "bh", "by", "none"]), st.sampled_from([3, 9999]))
def test_properties(values: np.ndarray, correction: Any, resamples: int) -> None:
    found = sign_flip_test(effects(values), correction=correction, resamples=resamples)
    tested = found["tested"].values
    assert np.array_equal(tested, (values != 0).any(axis=0))
    p, corrected = found["p"].values, found["p_corrected"].values
    assert np.isnan(p[~tested]).all()
    assert np.isnan(corrected[~tested]).all()
    assert not found["significant"].values[~tested].any()
    assert ((p[tested] > 0) & (p[tested] <= 1)).all()
    assert ((corrected[tested] >= p[tested] - 1e-12) & (corrected[tested] <= 1)).all()
    if correction != "max-t":  # the order of p is kept
        assert (np.diff(corrected[tested][np.argsort(p[tested], kind="stable")]) >= -1e-12).all()
    assert np.array_equal(found["significant"].values, np.nan_to_num(corrected, nan=9) <= 0.05)


@QUICK
@given(small_tables, st.randoms(use_true_random=False), st.sampled_from([3, 9999]))
def test_the_order_and_sign_of_pairs_do_not_matter(values: np.ndarray, random: Any, resamples: int) -> None:
    order = random.sample(range(len(values)), len(values))
    one, other = (sign_flip_test(effects(table), resamples=resamples) for table in (values, values[order]))
    xr.testing.assert_identical(one, other)
    xr.testing.assert_identical(mean_effects(effects(values)), mean_effects(effects(values[order])))
    turned = sign_flip_test(effects(-values))
    np.testing.assert_array_equal(turned["p"], sign_flip_test(effects(values))["p"])


def test_the_scale_of_a_site_does_not_matter() -> None:
    values = noise(5, 12, 6, shift=0.4)
    scaled = values * np.array([1e-30, 1, 1e-6, 1e6, 1e12, 3], np.float32)
    for key in ("p", "p_corrected"):
        np.testing.assert_array_equal(sign_flip_test(effects(scaled))[key], sign_flip_test(effects(values))[key])


@pytest.mark.parametrize("correction", ["max-t", "by"])
def test_family_wise_error_without_any_effect(correction: Any) -> None:
    runs = 200
    false = 0
    for seed in range(runs):
        shared = noise(seed, 12, 1)  # sites are correlated, and their scales differ
        values = (noise(seed + runs, 12, 30) + shared) * np.logspace(-3, 2, 30, dtype=np.float32)
        found = sign_flip_test(effects(values), correction=correction, resamples=199, seed=seed)
        false += bool(found["significant"].any())
    assert false <= stats.binom.ppf(0.99, runs, 0.05)  # 5% of runs, as far as this many can tell


def test_power_for_a_planted_effect() -> None:
    values = noise(0, 50, 10, 30)
    values[:, 4, 7] += 1.0
    values[:, 2, 3] -= 1.0
    options: dict[Any, int] = {"max-t": 9999, "bh": 9999, "by": 49999}
    for correction, resamples in options.items():
        found = sign_flip_test(effects(values), correction=correction, resamples=resamples)
        assert set(map(tuple, np.argwhere(found["significant"].values))) == {(4, 7), (2, 3)}
        assert found.attrs["note"] == ""
    assert "only if 4 of 300 reach it" in sign_flip_test(effects(values), correction="by").attrs["note"]


def test_components_make_one_family() -> None:
    z, mlp = effects(noise(1, 9, 3, 2, shift=0.8)), effects(noise(2, 9, 3, shift=0.8))
    found = sign_flip_tests({"z": z, "mlp_out": mlp})
    together = np.concatenate([z.values.reshape(9, -1), mlp.values], axis=1)
    whole = sign_flip_test(effects(together))
    parts = np.concatenate([found["z"]["p_corrected"].values.reshape(-1), found["mlp_out"]["p_corrected"].values])
    np.testing.assert_allclose(parts, whole["p_corrected"])
    assert found["z"].attrs["family"] == 9
    with pytest.raises(InputError, match="same pairs throughout, not z 9, mlp_out 8"):
        sign_flip_tests({"z": z, "mlp_out": mlp[:8]})


def test_large_families_pass_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    effect = effects(noise(1, 16, 300))
    whole, intervals = sign_flip_test(effect), mean_effects(effect)
    monkeypatch.setattr("nsp.statistics.sign_flip._CELLS", 2048 * 64)
    monkeypatch.setattr("nsp.statistics.intervals._CELLS", 2000 * 100)
    for key in ("p", "p_corrected"):
        np.testing.assert_allclose(sign_flip_test(effect)[key], whole[key], atol=2e-4)
    xr.testing.assert_allclose(mean_effects(effect), intervals)


# --- what is no evidence --------------------------------------------------------------------------------------------


def test_one_pair_has_effects_and_no_significance() -> None:
    effect = effects(noise(0, 1, 3))
    found, means = sign_flip_test(effect), mean_effects(effect)
    assert not found["tested"].any()
    assert not found["significant"].any()
    assert found["p"].isnull().all()
    assert found.attrs["note"] == "one pair gives effects and no significance"
    np.testing.assert_array_equal(means["mean"], effect[0])
    assert means["low"].isnull().all()
    assert (means["n"] == 1).all()


def test_too_few_pairs_or_flips_say_so() -> None:
    four = sign_flip_test(effects(np.ones((4, 2))))
    assert not four["significant"].any()
    assert four.attrs["note"].endswith("p is never under 0.125: no site can be significant at 0.05; 6 pairs can")
    assert sign_flip_test(effects(np.ones((6, 2))))["significant"].all()
    few = sign_flip_test(effects(noise(0, 30, 3)), resamples=9)
    assert few.attrs["note"] == "with 9 flips p is never under 0.1; 19 can reach 0.05"
    bh = sign_flip_test(effects(noise(0, 30, 300)), resamples=99, correction="bh")
    assert "only if 60 of 300 reach it" in bh.attrs["note"]
    assert sign_flip_test(effects(noise(0, 30, 300)), resamples=99).attrs["note"] == ""


def test_pruned_sites_are_in_no_family() -> None:
    values = noise(0, 12, 4, shift=0.9)
    alone = sign_flip_test(effects(values))
    padded = np.concatenate([values, np.zeros((12, 500), np.float32)], axis=1)
    padded[:, 10] = -0.0
    found = sign_flip_test(effects(padded))
    assert found.attrs["family"] == 4
    np.testing.assert_array_equal(found["p_corrected"][:4], alone["p_corrected"])
    assert not found["tested"][4:].any()
    nothing = sign_flip_test(effects(np.zeros((5, 3))))
    assert "nothing was tested" in nothing.attrs["note"]
    means = mean_effects(effects(padded))
    assert (means[["mean", "low", "high"]].isel(layer=slice(4, None)) == 0).all().to_array().all()


def test_missing_cells_are_judged_by_the_pairs_that_are_there() -> None:
    values = noise(4, 12, 4, shift=0.6)
    values[3:, 1] = np.nan
    values[1:, 2] = np.nan
    values[:, 3] = np.nan
    found, means = sign_flip_test(effects(values)), mean_effects(effects(values))
    assert found["n"].values.tolist() == means["n"].values.tolist() == [12, 3, 1, 0]
    assert found["tested"].values.tolist() == [True, True, False, False]
    short = effects(values[:3, 1:2])
    np.testing.assert_allclose(found["p"][1], sign_flip_test(short)["p"][0])
    for key in ("mean", "low", "high"):
        np.testing.assert_allclose(means[key][1], mean_effects(short)[key][0])
    np.testing.assert_allclose(means["mean"][2], values[0, 2])
    assert np.isnan(means["low"][2])
    assert np.isnan(means["mean"][3])


@pytest.mark.parametrize(
    ("effect", "message"),
    [
        (xr.DataArray(np.ones((2, 2)), dims=("layer", "head")), "have no dim 'pair', .* their dims: layer, head"),
        (xr.DataArray(np.ones((0, 2)), dims=("pair", "head")), "have no pair"),
        (xr.DataArray([[True]], dims=("pair", "head")), "of type bool, not numbers"),
        (effects([[1, np.inf], [1, 2]]), r"infinite in 1 cells, the first at \{'pair': 0, 'layer': 1\}"),
        (xr.Dataset(), "are a Dataset; give one variable"),
    ],
)
def test_what_is_no_table_of_effects(effect: Any, message: str) -> None:
    for function in (mean_effects, sign_flip_test, split_pairs):
        with pytest.raises(InputError, match=message):
            function(effect)


def test_options_out_of_range() -> None:
    effect = effects(noise(0, 4, 2))
    for call, message in (
        (lambda: sign_flip_test(effect, correction="holm"), "'holm'; take one of max-t, bh, by, none"),  # type: ignore[arg-type]
        (lambda: sign_flip_test(effect, level=5), "level is 5"),
        (lambda: sign_flip_test(effect, resamples=0), "resamples is 0"),
        (lambda: mean_effects(effect, confidence=95), "confidence is 95"),
        (lambda: mean_effects(effect, resamples=0), "resamples is 0"),
        (lambda: mean_effects(effect, method="t"), "take percentile or bca"),  # type: ignore[arg-type]
        (lambda: split_pairs(effect, fraction=1), "fraction is 1"),
        (lambda: split_pairs(effect[:1]), "one pair cannot be split"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_agree_with_scipy(method: Any) -> None:
    values = np.sort(noise(0, 9, 3, shift=0.3), axis=0)
    ours = mean_effects(effects(values), method=method, resamples=9000)
    theirs = stats.bootstrap(
        (values.astype(np.float64),), np.mean, axis=0, method=method, n_resamples=9000, random_state=1
    ).confidence_interval
    np.testing.assert_allclose(ours["low"], theirs.low, atol=0.04)
    np.testing.assert_allclose(ours["high"], theirs.high, atol=0.04)
    np.testing.assert_allclose(ours["mean"], values.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_cover(method: Any) -> None:
    found = mean_effects(effects(noise(0, 40, 1000, shift=0.3)), method=method, confidence=0.9)
    inside = float(((found["low"] <= 0.3) & (found["high"] >= 0.3)).mean())
    assert 0.86 < inside < 0.93


def test_effects_keep_their_labels() -> None:
    effect = effects(noise(0, 5, 3, 2)).assign_coords(token=(("pair", "layer"), np.full((5, 3), "x")), kind="z")
    for found in (mean_effects(effect), sign_flip_test(effect.transpose("layer", "pair", "head"))):
        assert found.sizes == {"layer": 3, "head": 2}
        assert set(found.coords) == {"layer", "head", "kind"}
        assert all(variable.attrs["long_name"] and variable.attrs["units"] for variable in found.values())
    assert mean_effects(effect)["low"].attrs["units"] == "logit"
    equal = mean_effects(effects(np.full((4, 1), 0.3)), method="bca")
    assert equal["low"].item() == equal["high"].item() == equal["mean"].item() == np.float32(0.3)


# --- dependent pairs, null sets, split halves -----------------------------------------------------------------------


def test_pairs_that_belong_together_are_one() -> None:
    effect = effects([[1, 2], [3, np.nan], [5, 6]])
    found = average_pairs(effect, ["b", "a", "b"])
    np.testing.assert_array_equal(found, [[3, 4], [3, np.nan]])
    assert found.dims == effect.dims
    assert found.attrs == effect.attrs
    with pytest.raises(InputError, match="one label for each of 3 pairs"):
        average_pairs(effect, ["a"])


@QUICK
@given(hnp.arrays(bool, (4, 6)), st.integers(0, 99), st.sampled_from([(), ("layer",), ("head", "layer")]))
def test_random_sites_match_the_chosen(chosen: np.ndarray, seed: int, within: tuple[str, ...]) -> None:
    mask = xr.DataArray(chosen, dims=("layer", "head"))
    counts = mask.sum([dim for dim in mask.dims if dim not in within])
    if (counts > mask.size // counts.size - counts).any():
        with pytest.raises(InputError, match="others can be drawn"):
            random_sites(mask, within=within, seed=seed)
        return
    drawn = random_sites(mask, within=within, seed=seed)
    assert not (drawn & mask).any()
    xr.testing.assert_equal(drawn.sum([dim for dim in mask.dims if dim not in within]), counts)
    xr.testing.assert_equal(drawn, random_sites(mask, within=within, seed=seed))


def test_random_sites_are_eligible() -> None:
    chosen = xr.DataArray([True, False, False, False], dims="layer")
    eligible = xr.DataArray([True, False, True, False], dims="layer")
    assert {int(np.argmax(random_sites(chosen, eligible, seed=seed).values)) for seed in range(9)} == {2}
    with pytest.raises(InputError, match="no dim 'head'; they have layer"):
        random_sites(chosen, within=["head"])
    with pytest.raises(InputError, match="true and false"):
        random_sites(chosen.astype(float))


def test_matched_null() -> None:
    values = noise(0, 30, 5, 20)
    values[:, 2, 3] += 2
    values[:, 2, 4:] = 0
    effect = effects(values)
    chosen = xr.zeros_like(effect[0], dtype=bool)
    chosen[2, 3] = True
    found = matched_null(effect, chosen, draws=500)
    assert float(found["strength"]) == pytest.approx(2, abs=0.5)
    assert float(found["p"]) < 0.05
    assert float(found["null_high"]) < 2
    assert float(matched_null(effect, chosen, within=["layer"])["p"]) > 0.1  # only three others in that layer
    p = [
        float(matched_null(effects(noise(seed, 10, 40)), xr.DataArray(np.arange(40) < 5, dims="layer"), draws=99)["p"])
        for seed in range(100)
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    with pytest.raises(InputError, match="no site is chosen"):
        matched_null(effect, chosen & False)
    with pytest.raises(InputError, match="chosen has sizes"):
        matched_null(effect, chosen[0])


@given(st.integers(2, 30), st.floats(0.01, 0.99), st.integers(0, 9))
def test_parts_of_the_pairs(count: int, fraction: float, seed: int) -> None:
    one, other = split_pairs(effects(noise(0, count, 2)), fraction=fraction, seed=seed)
    assert sorted([*one["pair"].values, *other["pair"].values]) == list(range(count))
    assert one.sizes["pair"] == min(max(round(fraction * count), 1), count - 1)


def test_split_half_undoes_the_winner_s_curse() -> None:
    dipped, honest = [], []
    for seed in range(25):
        values = noise(seed, 24, 40, shift=0.35)
        effect = effects(values)
        found = split_half(effect, correction="none", resamples=499, seed=seed)
        chosen = found["selected"].values
        first, _ = split_pairs(effect, seed=seed)
        dipped += first.mean("pair").values[chosen].tolist()
        honest += found["mean"].values[chosen].tolist()
        assert found["mean"].isnull().values.tolist() == (~chosen).tolist()
        assert found["significant"].values[~chosen].sum() == 0
    assert np.mean(dipped) > 0.5
    assert np.mean(honest) == pytest.approx(0.35, abs=0.05)


def test_split_half_finds_what_is_there() -> None:
    values = noise(0, 50, 60)
    values[:, 7] += 1.5
    found = split_half(effects(values))
    assert np.flatnonzero(found["significant"]).tolist() == [7]
    assert found["low"][7] < 1.5 < found["high"][7]
    assert (found.attrs["select_pairs"], found.attrs["estimate_pairs"]) == (25, 25)
    nothing = split_half(effects(noise(3, 50, 60)))
    assert not nothing["selected"].any()
    assert nothing.attrs["note"] == "no site was selected"
