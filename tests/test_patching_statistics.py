"""The report of activation patching and its statistics: what is significant, what is not, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from engine_models import both, one_thread, text  # noqa: F401

import nsp
from nsp.experiments import EXPERIMENTS, activation_patching, report
from nsp.experiments.activation_patching.recipe import StatisticsOptions
from nsp.experiments.activation_patching.statistics import judge
from nsp.statistics import matched_nulls

FLIPS = StatisticsOptions(resamples=999, bootstrap=200)


def words(generator: np.random.Generator, count: int) -> list[int]:
    return [int(word) for word in generator.integers(0, 59, count)]


def related(seed: int, count: int) -> list[nsp.Pair]:
    """Pairs whose answer is what the model itself says after the clean prompt: their donors do carry it."""
    generator, pairs = np.random.default_rng(seed), []
    of = both("llama")
    for _ in range(count):
        clean, corrupt = words(generator, 5), words(generator, 5)
        here, there = (of.reference.logits(ids)[-1].numpy() for ids in (clean, corrupt))
        answer, distractor = int((here - there)[:59].argmax()), int((here - there)[:59].argmin())
        pairs.append(nsp.pair(text(clean), text(corrupt), f"w{answer}", f"w{distractor}"))
    return pairs


@pytest.fixture(scope="module")
def tree() -> xr.DataTree:
    found = activation_patching(
        both("llama").model, related(0, 16), components=["z", "resid_post"], heads="all", positions="last"
    )
    assert isinstance(found, xr.DataTree)
    return found


def part(tree: xr.DataTree, low: int, high: int) -> xr.DataTree:
    """Some pairs of a run as a run."""
    found = tree.isel(pair=slice(low, high))
    found.attrs = tree.attrs
    return found


def test_shuffled_donors_have_no_significant_site() -> None:
    """Donors that have nothing to do with their pair: at most 5% of runs find any site at 0.05.

    100 runs of 6 pairs (of which p can be 1/32 or more), each judged as a report judges it, over all heads and layers.
    """
    generator, runs, pairs = np.random.default_rng(0), 100, 6
    made = []
    for _ in range(runs * pairs):
        answer, distractor = generator.choice(59, 2, replace=False)
        made.append(
            nsp.pair(text(words(generator, 5)), text(words(generator, 5)), f"w{answer}", f"w{distractor}")
        )
    tree = activation_patching(
        both("llama").model, made, components=["z", "resid_post"], heads="all", positions="last"
    )
    found = [judge(part(tree, run * pairs, run * pairs + pairs), FLIPS) for run in range(runs)]
    assert all(one.tested == 15 for one in found)
    assert sum(one.significant > 0 for one in found) <= 0.05 * runs


def test_related_donors_have_significant_sites(tree: xr.DataTree) -> None:
    found = judge(tree, FLIPS)
    assert found.pairs == 16
    assert bool(found.sites["resid_post"]["significant"].sel(layer=2).all())  # the final stream is the donor's
    np.testing.assert_allclose(found.sites["resid_post"]["mean"].sel(layer=2), 1, atol=1e-4)
    assert found.selected > 0
    assert found.null is not None
    assert float(found.null["strength"]) > float(found.null["null_mean"])


def test_the_test_is_of_the_change_and_the_interval_of_the_effect(tree: xr.DataTree) -> None:
    from nsp.statistics import mean_effects, sign_flip_tests

    found = judge(tree, FLIPS)
    change = {
        name: tree[f"effects/{name}"]["logit_diff"].astype(float) - tree["baseline"]["logit_diff_corrupt"].astype(float)
        for name in map(str, tree["effects"].children)
    }
    tests = sign_flip_tests(change, resamples=999)
    for name, test in tests.items():
        np.testing.assert_allclose(found.sites[name]["p_corrected"], test["p_corrected"])
        interval = mean_effects(tree[f"effects/{name}"]["effect"].astype(float), resamples=200)
        np.testing.assert_allclose(found.sites[name]["low"], interval["low"])


def test_interchange_has_one_observation_a_pair() -> None:
    pairs = related(1, 8)
    of = both("llama").model
    there = activation_patching(of, pairs, positions="last", mode="denoising")
    back = activation_patching(of, pairs, positions="last", mode="noising")
    found = judge(activation_patching(of, pairs, positions="last", mode="interchange"), FLIPS)
    assert found.pairs == 8
    mean = (there["effects/resid_post"]["effect"].mean("pair") + back["effects/resid_post"]["effect"].mean("pair")) / 2
    np.testing.assert_allclose(found.sites["resid_post"]["mean"], mean, rtol=1e-5)
    # Changes towards the clean run add up; without their direction they would cancel.
    assert bool(found.sites["resid_post"]["significant"].sel(layer=2).all())


def test_what_is_not_finite_is_named_and_in_no_mean(tree: xr.DataTree) -> None:
    broken = tree.copy(deep=True)
    broken["effects/z"]["logit_diff"][3, 1, 0, 2] = np.inf
    broken["effects/z"]["effect"][3, 1, 0, 2] = np.inf
    found = judge(broken, FLIPS)
    assert found.wrong == ["z: layer 1, position 4, head 2 (pair 3)"]
    assert np.isnan(found.sites["z"]["mean"].sel(layer=1, head=2)).all()
    assert found.tested == judge(tree, FLIPS).tested - 1
    assert "z: layer 1, position 4, head 2 (pair 3)" in report(broken)


# The report


def lines_of(tree: xr.DataTree, **keys: Any) -> str:
    keys.setdefault("statistics", {"resamples": 999, "bootstrap": 200})
    return report(tree, **keys)


def test_a_report_says_what_was_run_and_how_sure_it_is(tree: xr.DataTree) -> None:
    found = lines_of(tree)
    assert found == tree.nsp.report(statistics={"resamples": 999, "bootstrap": 200})  # type: ignore[attr-defined,unused-ignore]
    baseline = tree["baseline"].to_dataset()
    clean, corrupt = (float(baseline[f"logit_diff_{run}"].mean()) for run in ("clean", "corrupt"))
    judged = judge(tree, FLIPS)
    for expected in (
        "16 pair(s), mode denoising",
        "z (z[*][*] @ last): 12 sites, layer 0 to 2, position 4, head 0 to 3; 192 counterfactuals ran on the branch path",
        f"clean {clean:.4f}, corrupt {corrupt:.4f}, total effect {clean - corrupt:.4f} [",
        f"significant: {judged.significant} of 15 sites ({100 * judged.significant / 15:.1f} %)",
        "corrected p at most 0.05 (max-T over all of them; 999 sign flips of the pairs; on the change of logit_diff)",
        "top layers, by their strongest significant effect: 2 (+1.000",
        "random sites: the ",
        "sites selected on 8 of 16 pairs have a mean absolute effect of",
        "resid_post: strongest sites, mean over 16 pairs with 95 % intervals, p corrected",
    ):
        assert expected in found
    assert "threshold" not in found
    assert "split" not in found
    summary = EXPERIMENTS["activation-patching"].summary(tree)
    (row,) = [row for row in summary.tables[1].rows if row[0] == 2]
    assert summary.tables[1].columns == ("layer", "position", "token", "effect", "low", "high", "p", "sig", "logit_diff")
    assert row[3] == pytest.approx(1, abs=1e-4)
    assert row[7] == "*"


def test_other_keys_of_the_report(tree: xr.DataTree) -> None:
    found = lines_of(tree, threshold=0.9, split=0.5, statistics={"correction": "bh", "alpha": 0.2, "resamples": 999})
    means = np.concatenate([one["mean"].values.ravel() for one in judge(tree, FLIPS).sites.values()])
    far = int((np.abs(means) >= 0.9).sum())
    assert f"threshold 0.9 (no test): {far} sites have a mean effect at least that far from 0" in found
    assert "corrected p at most 0.2 (Benjamini-Hochberg" in found
    assert "split: " in found
    assert "held-out effects: selected on 8 pairs, estimated on the other 8" in found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"threshhold": 1}, "did you mean 'threshold'"),
        ({"mode": "noising"}, "takes no 'mode'"),
        ({"split": 2.0}, "split"),
        ({"statistics": {"correction": "holm"}}, "statistics.correction"),
    ],
)
def test_keys_that_a_report_does_not_take(tree: xr.DataTree, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(nsp.InputError, match=message):
        report(tree, **keys)


def test_a_report_is_of_a_run(tree: xr.DataTree) -> None:
    with pytest.raises(nsp.InputError, match="whole run"):
        tree["effects/z"].to_dataset().nsp.report()
    with pytest.raises(nsp.InputError, match="not the result of an experiment"):
        report(xr.DataTree())


def test_one_pair_has_effects_and_no_significance() -> None:
    found = report(activation_patching(both("llama").model, related(2, 1), components="z", heads="all"))
    assert "one pair gives effects and no significance" in found
    assert "significant:" not in found
    assert "random sites" not in found
    assert "p corrected" not in found


def test_few_pairs_say_that_nothing_can_be_significant() -> None:
    found = report(activation_patching(both("llama").model, related(3, 4), positions="last"))
    assert "with 4 pairs p is never under 0.125: no site can be significant at 0.05; 6 pairs can" in found
    assert "no site is significant on 2 of 4 pairs alone" in found


def test_pairs_without_a_difference_are_named() -> None:
    same = nsp.pair(text([1, 2, 3]), text([1, 2, 3]), "w4", "w9", name="alike")
    found = report(activation_patching(both("llama").model, [same, *related(4, 3)], positions="last"))
    assert "1 pair(s) whose two runs agree in logit_diff have no effect to normalise: alike" in found
    assert "prompts differ in length" not in found


def test_a_store_is_reported_as_its_tree_is(tmp_path: Path) -> None:
    """From memory, from the store that was written, and by plain xarray: one text."""
    keys: dict[str, Any] = {"positions": "last", "metric": ["logit_diff", "kl"], "threshold": 0.5}
    of, pairs = both("llama").model, related(5, 7)
    there = activation_patching(of, pairs, **keys)
    activation_patching(of, pairs, **keys, out=tmp_path / "x.zarr")
    stored = nsp.open_run(tmp_path / "x.zarr").tree
    assert report(there) == report(stored)
    assert "threshold 0.5" in report(stored)
    assert "on the change of logit_diff" in report(stored)  # the first metric, whatever the order in the store
    kept = nsp.open_run(tmp_path / "x.zarr").header["extra"]["headline"]
    assert kept == "logit_diff: strongest resid_post layer 2, position 4, effect +1.000"


# The null


def test_control_sets_find_a_choice_that_missed() -> None:
    """Weak sites chosen while strong ones are left: the chosen set is not strong, and controls are."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(40, 30)) * 0.1
    values[:, :15] += 5
    effect = xr.DataArray(values, dims=("pair", "neuron"))
    number = xr.DataArray(np.arange(30), dims="neuron")
    right = matched_nulls({"a": effect}, {"a": number < 10})
    assert float(right["p"]) < 0.01
    assert float(right["strength"]) == pytest.approx(5, abs=0.1)
    assert int(right["controls_significant"]) == 0
    wrong = matched_nulls({"a": effect}, {"a": (number >= 20)}, controls=20, draws=4000)
    assert float(wrong["p"]) > 0.9
    assert float(wrong["control_strength"]) > 3


def test_a_null_matches_each_component() -> None:
    """Two components of very different strength: random sets have as many sites of each as were chosen."""
    strong = xr.DataArray(np.full((6, 8), 4.0), dims=("pair", "head"))
    weak = xr.DataArray(np.full((6, 50), 1.0), dims=("pair", "neuron"))
    chosen = {
        "strong": xr.DataArray(np.arange(8) < 3, dims="head"),
        "weak": xr.DataArray(np.arange(50) < 1, dims="neuron"),
    }
    found = matched_nulls({"strong": strong, "weak": weak}, chosen)
    assert int(found["size"]) == 4
    for name in ("strength", "null_mean", "null_low", "null_high", "control_strength"):
        assert float(found[name]) == pytest.approx((3 * 4 + 1) / 4)
    assert float(found["p"]) == 1
    # Fewer sites are left than were chosen: there are no controls, and no error.
    most = {**chosen, "strong": xr.DataArray(np.arange(8) < 5, dims="head")}
    found = matched_nulls({"strong": strong, "weak": weak}, most)
    assert int(found["controls"]) == 0
    assert np.isnan(float(found["control_strength"]))
