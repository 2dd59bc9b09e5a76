"""The alignment scan: its selection on arrays whose answer is known, its recipe and its store on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import LAYERS, NEURONS, model, one_thread, text  # noqa: F401
from scipy import stats

from nsp.errors import InputError
from nsp.experiments import EXPERIMENTS, pairs, run
from nsp.experiments.alignment_scan.prompts import refuses
from nsp.experiments.alignment_scan.select import neuron_table, overlap, select_neurons

KIND = "alignment-scan"
OPTIONS: dict[str, Any] = {"sigma": 2.0, "min_precision": 0.8, "level": 0.05}


def planted(fires: list[tuple[int, int]], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (prompt, layer, neuron) of noise in which the given neurons are high on harmful prompts."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(80, 3, 40)).astype(np.float32)
    harmful, held = np.arange(80) < 40, np.arange(80) % 2 == 1
    for layer, neuron in fires:
        values[harmful, layer, neuron] += 8
    return values, harmful, held


def test_planted_neurons_are_selected_and_confirmed_and_no_others() -> None:
    sites = [(0, 3), (2, 7), (2, 39)]
    values, harmful, held = planted(sites)
    found = select_neurons(values, np.array([4, 5, 6]), harmful, held, **OPTIONS)
    assert (
        found.sites(found.selected) == found.sites(found.confirmed) == {(4 + layer, neuron) for layer, neuron in sites}
    )
    table = neuron_table(found)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["recall"] == 1.0
    assert row["precision"] >= 0.8
    assert row["lift"] == pytest.approx(row["precision"] * 2)


def test_counts_and_p_values_are_those_of_a_fisher_test() -> None:
    values, harmful, held = planted([(1, 1)])
    found = select_neurons(values, np.arange(3), harmful, held, **OPTIONS)
    flat = values.reshape(80, -1)
    here = ~held
    for at in (0, 41, 77):
        normal = flat[here & ~harmful, at]
        fires = flat[:, at] > normal.mean() + 2 * normal.std(ddof=1)
        table = [[int((fires & harmful & here).sum()), int((fires & ~harmful & here).sum())],
                 [int((~fires & harmful & here).sum()), int((~fires & ~harmful & here).sum())]]  # fmt: skip
        assert (int(found.searched.harmful[at]), int(found.searched.normal[at])) == tuple(table[0])
        assert found.searched.p[at] == pytest.approx(stats.fisher_exact(table, alternative="greater").pvalue)


def test_noise_alone_selects_nothing() -> None:
    for seed in range(5):
        values, harmful, held = planted([], seed)
        found = select_neurons(values, np.arange(3), harmful, held, **OPTIONS)
        assert not found.confirmed.any()
        assert len(neuron_table(found).rows) == 20  # what came nearest, flagged as not selected


def test_a_neuron_of_the_searched_half_alone_is_not_confirmed() -> None:
    values, harmful, held = planted([])
    values[harmful & ~held, 1, 5] += 8
    found = select_neurons(values, np.arange(3), harmful, held, **OPTIONS)
    assert found.sites(found.selected) == {(1, 5)}
    assert not found.confirmed.any()


def test_missing_values_are_refused() -> None:
    values, harmful, held = planted([])
    values[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="not finished"):
        select_neurons(values, np.arange(3), harmful, held, **OPTIONS)


def test_overlap_is_hypergeometric() -> None:
    first, second = {(1, n) for n in range(10)} | {(9, 0)}, {(1, n) for n in range(5, 25)}
    both = overlap(first, second, {1}, 100)
    assert (both.population, both.first, both.second) == (100, 10, 20)
    assert both.shared == tuple((1, n) for n in range(5, 10))
    assert both.expected == pytest.approx(2.0)
    assert both.p == pytest.approx(stats.hypergeom(100, 10, 20).sf(4))


def test_refusals_are_known_by_how_they_begin() -> None:
    assert refuses("I\u2019m sorry, but I can't help with that.")
    assert refuses(" I cannot do this")
    assert not refuses("Sure! First, take the key.")
    assert not refuses("The word sorry stands late in this one, after a good many other words of reply, I'm sorry.")


def prompts(seed: int, start: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [text([start, *rng.integers(0, 58, int(rng.integers(2, 6))).tolist()]) for _ in range(12)]


def test_the_scan_on_a_model_reads_the_right_activations_and_keeps_them(tmp_path: Path) -> None:
    tiny = model("llama")
    recipe = EXPERIMENTS[KIND].recipe_class.model_validate(
        {"kind": KIND, "harmful_txt": prompts(0, 3), "normal_txt": prompts(1, 9), "reduce": "max", "layers": "1:"}
    )
    tree = run(EXPERIMENTS[KIND](tiny, recipe), out=tmp_path / "a.zarr", progress=False).tree
    values = tree["activations/mlp_neurons"]["value"]
    assert values.shape == (24, LAYERS - 1, NEURONS)
    for row in (0, 17):
        seen: list[torch.Tensor] = []
        hook = tiny.module.model.layers[2].mlp.down_proj.register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            tiny.module(torch.tensor([[token for token in tree["inputs"]["token_id"].values[row].tolist() if token >= 0]]))
        hook.remove()
        np.testing.assert_allclose(values.sel(layer=2)[row], seen[0][0].amax(dim=0).numpy(), atol=1e-5)
    # The first word tells the two sets apart here, and some neuron hears it.
    summary = EXPERIMENTS[KIND].summary(tree)
    assert "24 prompts" not in str(summary)
    assert pairs.alignment_neurons(tree).searched.n_harmful == 6
    (table,) = EXPERIMENTS[KIND].tables(tree)  # type: ignore[misc]
    assert table.title == "alignment_neurons"


def test_sets_that_do_not_go_together_are_refused() -> None:
    recipe = EXPERIMENTS[KIND].recipe_class
    with pytest.raises(ValueError, match="go together"):
        recipe.model_validate({"kind": KIND, "harmful_txt": ["a"]})
    with pytest.raises(ValueError, match="auto: pairs"):
        recipe.model_validate({"kind": KIND, "auto": "pairs", "harmful_txt": ["a"], "normal_txt": ["b"]})
    tiny = model("llama")
    few = recipe.model_validate({"kind": KIND, "harmful_txt": ["w1 w2"], "normal_txt": ["w3 w4"]})
    with pytest.raises(InputError, match="too few"):
        EXPERIMENTS[KIND](tiny, few)


def test_refusals_need_both_kinds_of_reply() -> None:
    tiny = model("llama")
    recipe = EXPERIMENTS[KIND].recipe_class.model_validate(
        {"kind": KIND, "auto": "refusals", "harmful_txt": prompts(0, 3), "normal_txt": prompts(1, 9)}
    )
    with pytest.raises(InputError, match="answered all 24 prompts"):
        EXPERIMENTS[KIND](tiny, recipe)
