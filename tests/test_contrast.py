"""Contrasts: statistics against scipy, vectors against planted ones, activations against hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, LAYERS, NEURONS, WIDTH, both, one_thread, text
from scipy import stats

import nsp
from nsp.errors import InputError
from nsp.experiments import EXPERIMENTS, contrast, control_vectors
from nsp.experiments.circuits import Circuit, CircuitUnit
from nsp.experiments.contrast.decomposition import compare, decompose, down_columns, explained_by, pursue
from nsp.experiments.contrast.recipe import ContrastComponent
from nsp.experiments.contrast.statistics import TestOptions, cohen_d, contrast_statistics
from nsp.experiments.contrast.summary import summarise
from nsp.experiments.contrast.vectors import VECTOR_COMPONENTS, ControlVectors, separation, vectors_of
from nsp.recipe import load_recipe_file

__all__ = ["one_thread"]
POSITIVE = [text(CLEAN), text([1, 2, 3]), text([4, 5, 6, 7]), text([9, 10, 11])]
NEGATIVE = [text(CORRUPT), text([1, 2, 5]), text([4, 5, 6, 8]), text([9, 10, 12])]


def draw(seed: int, prompts: int, layers: int = 2, neurons: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(prompts, layers, neurons)).astype(np.float32)


# --- statistics -----------------------------------------------------------------------------------------------------


def test_effect_size_is_cohens_formula() -> None:
    high, low = draw(0, 7)[:, 0, 0].astype(float), draw(1, 5)[:, 0, 0].astype(float)
    pooled = np.sqrt((6 * high.var(ddof=1) + 4 * low.var(ddof=1)) / 10)
    assert cohen_d(high, low) == pytest.approx((high.mean() - low.mean()) / pooled, rel=1e-12)
    assert np.isnan(cohen_d(np.ones(3), np.zeros(3)))  # nothing varies
    assert np.isnan(cohen_d(np.ones(1), np.zeros(3)))


def test_permutation_p_agrees_with_scipy() -> None:
    high, low = draw(2, 9, 1, 3) + np.array([0.0, 0.8, 2.5], np.float32), draw(3, 8, 1, 3)
    made = contrast_statistics(high, low, TestOptions(correction="none", resamples=20000))
    for site in range(3):
        expected = stats.permutation_test(
            (high[:, 0, site], low[:, 0, site]),
            lambda a, b: abs(stats.ttest_ind(a, b, equal_var=False).statistic),
            n_resamples=4000, alternative="greater", rng=np.random.default_rng(0),
        )  # fmt: skip
        assert made["p"][0, site] == pytest.approx(expected.pvalue, abs=0.03)
    assert made["p"][0, 2] < 0.002


def test_corrections_find_what_is_there_and_nothing_else() -> None:
    high, low = draw(4, 14), draw(5, 14)
    high[:, 1, 7] += 3
    for correction in ("max-t", "bh", "by"):
        made = contrast_statistics(high, low, TestOptions(correction=correction))  # type: ignore[arg-type]
        assert np.argwhere(made["p_corrected"] <= 0.05).tolist() == [[1, 7]]
        if correction != "max-t":
            expected = stats.ttest_ind(high, low, equal_var=False).pvalue
            assert np.allclose(made["p"], expected)
            assert np.allclose(made["p_corrected"].ravel(), stats.false_discovery_control(expected.ravel(), method=correction))
            paired = contrast_statistics(high, low, TestOptions(paired=True, correction=correction))  # type: ignore[arg-type]
            assert np.allclose(paired["p"], stats.ttest_rel(high, low).pvalue)
    # max-t bounds the chance of any false unit: 80 units of noise, 40 times
    false = [
        (contrast_statistics(draw(s, 8), draw(s + 500, 8), TestOptions(resamples=200))["p_corrected"] <= 0.05).any()
        for s in range(100, 140)
    ]
    assert sum(false) <= 6


def test_paired_sets_take_out_what_pairs_share() -> None:
    shared = draw(6, 10) * 20
    high, low = shared + draw(7, 10) * 0.1 + 0.5, shared + draw(8, 10) * 0.1
    paired = contrast_statistics(high, low, TestOptions(paired=True))
    assert (paired["p_corrected"] <= 0.05).all()
    assert not (contrast_statistics(high, low, TestOptions())["p_corrected"] <= 0.05).any()


def test_a_constant_unit_is_not_tested() -> None:
    high, low = draw(9, 5), draw(10, 5)
    high[:, 0, 3] = low[:, 0, 3] = 1.5
    made = contrast_statistics(high, low, TestOptions())
    assert np.isnan(made["p"][0, 3])
    assert np.isfinite(made["p"]).sum() == made["p"].size - 1


# --- vectors --------------------------------------------------------------------------------------------------------


def test_mean_difference_and_pca_find_a_planted_direction() -> None:
    direction = np.random.default_rng(0).normal(size=40)
    direction /= np.linalg.norm(direction)
    shared = draw(11, 12)
    strength = np.linspace(2, 6, 12)[:, None, None]
    high = shared + strength * direction + draw(12, 12) * 0.05
    low = shared + draw(13, 12) * 0.05
    mean, share = vectors_of(high, low)
    assert np.allclose(mean, high.mean(0) - low.mean(0), atol=1e-5)
    first, along = vectors_of(high, low, "pca")
    for layer in range(2):
        unit = first[layer] / np.linalg.norm(first[layer])
        assert unit @ direction > 0.999  # and it points to the positive set
        assert np.linalg.norm(first[layer]) == pytest.approx(4, rel=0.02)
    assert (along > 0.98).all()
    assert (along >= share - 1e-6).all()  # no direction through the origin explains more
    flipped, _ = vectors_of(low, high, "pca")
    assert np.allclose(flipped, -first, atol=1e-5)


def test_pca_needs_pairs() -> None:
    with pytest.raises(InputError, match="equally many"):
        vectors_of(draw(0, 4), draw(1, 5), "pca")


def test_separation_is_measured_on_held_out_prompts() -> None:
    noise = [separation(draw(s, 8, 1, 200), draw(s + 50, 8, 1, 200), paired=False)[1][0] for s in range(20)]
    # 200 columns fit 16 prompts of pure noise perfectly; held out they are told apart by chance.
    assert 0.3 < float(np.mean(noise)) < 0.6
    high = draw(14, 8)
    high[:, 1] += 1
    d, right = separation(high, draw(15, 8), paired=True)
    assert right[1] == 1
    assert d[1] > 3 > d[0]
    assert np.isnan(separation(draw(0, 2), draw(1, 2), paired=False)[0]).all()


def test_control_vectors_go_to_plain_data_and_back() -> None:
    made = ControlVectors("resid_post", (1, 4), draw(16, 2)[:, 0], "pca", "mood")
    assert ControlVectors.from_dict(made.to_dict()) == made
    assert made.select([4]).layers == (4,)
    assert (made.select([4]).at(4) == made.at(4)).all()
    with pytest.raises(InputError, match="layers: 1, 4"):
        made.at(2)
    with pytest.raises(InputError, match="NaN"):
        ControlVectors("resid_post", (0,), np.full((1, 3), np.nan))
    with pytest.raises(InputError, match="not 'pattern'"):
        ControlVectors("pattern", (0,), np.zeros((1, 3)))


# --- decomposition --------------------------------------------------------------------------------------------------


def test_pursuit_finds_a_planted_sum() -> None:
    columns = np.random.default_rng(1).normal(size=(30, 12))
    vector = 3 * columns[4] - 2 * columns[9]
    made = pursue(vector, columns, 5)
    assert set(made.neurons[:2].tolist()) == {4, 9}
    assert made.explained[1] == pytest.approx(1, abs=1e-9)
    assert (np.diff(made.explained) >= -1e-12).all()
    kept = dict(zip(made.neurons.tolist(), made.coefficients, strict=True))
    assert kept[4] == pytest.approx(3, abs=1e-6)
    other = np.random.default_rng(2).normal(size=12)
    made = pursue(other, columns, 6)
    assert made.explained[3] == pytest.approx(explained_by(other, columns[made.neurons[:4]]), abs=1e-9)
    assert len(set(made.neurons.tolist())) == 6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_columns_are_what_neurons_add_to_the_stream(family: str) -> None:
    pair = both(family)
    values = pair.reference.values(CLEAN, [("mlp_neurons", 1), ("mlp_out", 1)])
    neurons, out = values[("mlp_neurons", 1)][:, :, 0].numpy(), values[("mlp_out", 1)][:, 0].numpy()
    made = neurons @ down_columns(pair.model, 1)
    offset = out - made  # a bias, the same for every token
    assert np.allclose(offset, offset[0], atol=1e-5)
    assert np.abs(made).max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_vector_made_of_columns_is_taken_apart_into_them(family: str) -> None:
    model = both(family).model
    columns = down_columns(model, 2)
    vectors = ControlVectors("resid_post", (2,), (2 * columns[[5]] + columns[[17]] - columns[[30]]).astype(np.float32))
    made = decompose(model, vectors, steps=8)
    assert set(made["pursuit_neuron"].values[0, :3].tolist()) == {5, 17, 30}
    assert float(made["explained"][0, 2]) == pytest.approx(1, abs=1e-5)
    assert float(made["by_chance"][0, 2]) < 0.4
    assert float(made["cosine"].sel(neuron=5)[0]) == pytest.approx(
        float(columns[5] @ vectors.at(2) / np.linalg.norm(columns[5]) / np.linalg.norm(vectors.at(2))), abs=1e-5
    )
    circuit = Circuit(tuple(CircuitUnit(2, -1, neuron, value) for neuron, value in ((5, 2.0), (17, 1.0), (30, -0.5))))
    beside = compare(model, circuit, vectors)
    assert float(beside["explained"][0]) == pytest.approx(1, abs=1e-5)
    assert beside["circuit_neurons"].values.tolist() == [3]
    assert beside.attrs["top"] == 3
    other = compare(model, Circuit(tuple(CircuitUnit(2, 0, neuron, 1.0) for neuron in range(40, 43))), vectors)
    assert float(other["explained"][0]) < 0.5


def test_comparing_what_cannot_be_compared_says_so() -> None:
    model = both("llama").model
    vectors = ControlVectors("resid_post", (2,), np.ones((1, WIDTH), np.float32))
    with pytest.raises(InputError, match="share no layer"):
        compare(model, Circuit((CircuitUnit(0, 0, 1, 1.0),)), vectors)
    with pytest.raises(InputError, match="circuit of z"):
        compare(model, Circuit((CircuitUnit(2, 0, 1, 1.0),), "z"), vectors)
    with pytest.raises(InputError, match="no directions of the residual stream"):
        decompose(model, ControlVectors("mlp_neurons", (2,), np.ones((1, NEURONS), np.float32)))


# --- the experiment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("at", ["last", "mean"])
def test_activations_are_those_of_hooks(family: str, at: str) -> None:
    pair = both(family)
    tree = contrast(pair.model, POSITIVE, NEGATIVE, components=["mlp_neurons", "resid_post", "mlp_out"], at=at, resamples=20)
    for name in ("mlp_neurons", "resid_post", "mlp_out"):
        found = tree[f"activations/{name}"]["activation"]
        assert found.dims == ("prompt", "layer", "neuron")
        for row, prompt in enumerate([*POSITIVE, *NEGATIVE]):
            ids = pair.model.encode(prompt).token_ids
            values = pair.reference.values(ids, [(name, layer) for layer in range(LAYERS)])
            for layer in range(LAYERS):
                value = values[(name, layer)].reshape(len(ids), -1)
                expected = value[-1] if at == "last" else value[1:].mean(dim=0)
                assert np.allclose(found.values[row, layer], expected.numpy(), atol=2e-4)
        vectors = control_vectors(tree, name)
        difference = found.values[:4].mean(0) - found.values[4:].mean(0)
        assert np.allclose(vectors.values, difference, atol=1e-5)


def test_a_run_in_a_store_is_the_run_in_memory(tmp_path: Path) -> None:
    model = both("llama").model
    circuit = Circuit(tuple(CircuitUnit(layer, -1, neuron, 1.0 + neuron) for layer in (0, 2) for neuron in (3, 4, 5)))
    circuit.save(tmp_path / "circuit.json")
    options: dict[str, Any] = {"paired": True, "vectors": "pca", "resamples": 50, "circuit": str(tmp_path / "circuit.json")}
    here = contrast(model, POSITIVE, NEGATIVE, **{**options, "circuit": circuit})
    kept = contrast(model, POSITIVE, NEGATIVE, out=tmp_path / "x.zarr", **options)
    for path in ("activations/resid_post", "attribution/mlp_neurons", "attribution/resid_post-neurons", "circuit/resid_post"):
        for name, value in here[path].to_dataset().data_vars.items():
            assert np.array_equal(kept[path][name].values, value.values, equal_nan=True), (path, name)
    assert here.attrs["plan_hash"] == kept.attrs["plan_hash"], "a circuit is the same from a file and by value"
    anyone = xr.open_datatree(tmp_path / "x.zarr", engine="zarr", consolidated=False)
    assert anyone["attribution/resid_post"]["vector"].attrs["method"] == "pca"
    said = str(summarise(nsp.open_run(tmp_path / "x.zarr").tree))
    assert "4 positive and 4 negative prompts, paired" in said
    assert "rank correlation" in said
    assert control_vectors(kept, "resid_post", [1]).layers == (1,)
    with pytest.raises(InputError, match="they have mlp_neurons, resid_post"):
        control_vectors(kept, "mlp_out")


def test_layers_can_be_chosen() -> None:
    tree = contrast(both("llama").model, POSITIVE, NEGATIVE, components="resid_post", layers="1:3", resamples=5)
    assert control_vectors(tree).layers == (1, 2)
    assert tree["attribution/resid_post-neurons"]["layer"].values.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vectors": "pca"}, "paired: true"),
        ({"components": ["z"]}, "resid_post"),
        ({"components": ["resid_post", "resid_post"]}, "twice"),
        ({"layers": "9"}, "layer"),
        ({"at": "mean", "drop_first": 3}, "left with none"),
    ],
)
def test_wrong_options_name_what_would_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        contrast(both("llama").model, POSITIVE, NEGATIVE, **options)


def test_unequal_pairs_are_refused() -> None:
    with pytest.raises(Exception, match="not 4 and 3"):
        contrast(both("llama").model, POSITIVE, NEGATIVE[:3], paired=True)


def test_the_recipe_and_the_vectors_know_the_same_components() -> None:
    assert get_args(ContrastComponent) == VECTOR_COMPONENTS


def test_the_shipped_recipe_is_checked_like_any_other() -> None:
    (run,) = load_recipe_file("contrast", kinds={kind: one.recipe_class for kind, one in EXPERIMENTS.items()})
    assert run.recipe.kind == "contrast"


def test_smollm2_tells_cheerful_from_sad(smollm2: nsp.Model) -> None:
    """A direction learnt from some sentences puts others on the right side."""
    positive = ["I feel great and", "What a lovely day, it was", "She smiled because it was", "They were happy and"]
    negative = ["I feel awful and", "What a terrible day, it was", "She wept because it was", "They were miserable and"]
    tree = contrast(smollm2, positive, negative, components="resid_post", layers="8:20", paired=True, resamples=10)
    vectors = control_vectors(tree)
    others = {"The news was wonderful, and it": 1, "The news was dreadful, and it": -1}
    scores = {}
    for prompt, sign in others.items():
        with smollm2.trace(prompt) as t:
            t.record("resid_post[15] @ last")
        value = torch.as_tensor(t.results["resid_post"].values).reshape(-1).numpy()
        scores[sign] = float(value @ vectors.at(15))
    assert scores[1] > scores[-1]
