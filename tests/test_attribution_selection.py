"""Selection and verification as arithmetic: thresholds, filters, many prompts, areas, random circuits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nsp.errors import InputError
from nsp.experiments.attribution.recipe import Selection, read_blacklist
from nsp.experiments.attribution.selection import Scores, ranking, select_mask, universal_units
from nsp.experiments.attribution.verification import (
    areas,
    curve_masks,
    normalised,
    random_like,
    recall,
    size_reaching,
    sizes_of,
    spearman,
)

# (prompt, layer, position, unit): two prompts, two layers, two positions, three units.
VALUES = np.array(
    [
        [[[5.0, -1.0, 0.5], [0.2, 0.1, -4.0]], [[0.0, 3.0, -0.3], [2.0, 0.4, 0.6]]],
        [[[1.0, -7.0, 0.5], [0.2, 0.3, -4.0]], [[0.0, 3.0, -0.3], [-2.0, 0.4, 0.6]]],
    ]
)
SCORES = Scores(VALUES, [2, 5], np.array([[0, 3], [0, 3]]), np.array([4, 4]), np.array([10.0, -8.0]))


def kept(row: int = 0, **keys: Any) -> set[tuple[int, int, int]]:
    """(layer, token position, unit) kept for one prompt."""
    mask = select_mask(SCORES, Selection.model_validate({"top_k": None, **keys}), 8)[row]
    return {
        (SCORES.layers[layer], int(SCORES.places[row, place]), int(unit)) for layer, place, unit in np.argwhere(mask)
    }


def test_thresholds() -> None:
    assert kept(top_k=2) == {(2, 0, 0), (2, 3, 2)}
    assert kept(1, top_k=2) == {(2, 0, 1), (2, 3, 2)}
    assert kept(per_layer=1) == {(2, 0, 0), (5, 0, 1)}
    assert kept(per_layer=2, top_k=3) == {(2, 0, 0), (2, 3, 2), (5, 0, 1)}
    # The sum of absolute contributions is 17.1: 5 + 4 + 3 is 70% of it, 5 + 4 is 53%.
    assert kept(share=0.53) == {(2, 0, 0), (2, 3, 2), (5, 0, 1)}
    assert kept(share=0.5) == {(2, 0, 0), (2, 3, 2)}
    assert len(kept(share=1.0)) == 11  # a contribution of zero is never kept
    assert kept(percent=30) == {(2, 0, 0), (2, 3, 2), (5, 0, 1)}  # of a metric of 10
    assert kept(1, percent=50) == {(2, 0, 1), (2, 3, 2)}  # of 8, whatever its sign


def test_filters() -> None:
    assert kept(top_k=1, drop_first=True) == {(2, 3, 2)}
    assert kept(top_k=1, drop_last=1, sign="negative") == {(2, 0, 1)}
    assert kept(top_k=2, sign="positive") == {(2, 0, 0), (5, 0, 1)}
    assert kept(top_k=1, layers="5:") == {(5, 0, 1)}
    assert kept(top_k=1, blacklist=[(2, 0)]) == {(2, 3, 2)}
    with pytest.raises(InputError, match="layer"):
        kept(top_k=1, layers=9)


def test_many_prompts() -> None:
    assert kept(over="any", top_k=1) == kept(1, over="any", top_k=1) == {(2, 0, 0), (2, 0, 1)}
    # Means: 3, -4 at the first position of layer 2; what cancels (2 and -2) is gone.
    assert kept(over="mean", top_k=3) == {(2, 0, 1), (2, 3, 2), (2, 0, 0)} | set()
    assert (5, 3, 0) in kept(top_k=5)
    assert (5, 3, 0) not in kept(over="mean", share=1.0)
    apart = Scores(VALUES, [2, 5], np.array([[0, 3], [1, 2]]), np.array([4, 7]), np.array([1.0, 1.0]))
    with pytest.raises(InputError, match="positions that correspond"):
        select_mask(apart, Selection(over="mean"))
    last = Scores(VALUES[:, :, :1], [2, 5], np.array([[3], [6]]), np.array([4, 7]), np.array([1.0, 1.0]))
    assert last.shared_places() == [-1]
    assert SCORES.shared_places() == [0, 3]


def test_universal_units_are_found_and_left_out(tmp_path: Path) -> None:
    assert universal_units(SCORES, 2, 1.0) == {(2, 2)}
    assert universal_units(SCORES, 2, 0.5) == {(2, 0), (2, 1), (2, 2)}
    assert (2, 3, 2) not in kept(top_k=3, universal=1.0, universal_top=2)
    (tmp_path / "list.json").write_text(json.dumps([[2, 0], [2, 2]]), encoding="utf-8")
    assert read_blacklist(tmp_path / "list.json") == {(2, 0), (2, 2)}
    assert kept(top_k=1, blacklist=str(tmp_path / "list.json")) == {(5, 0, 1)}
    (tmp_path / "list.json").write_text("{}[", encoding="utf-8")
    with pytest.raises(InputError, match="no JSON list"):
        read_blacklist(tmp_path / "list.json")


def test_a_selection_that_selects_everything_is_refused() -> None:
    with pytest.raises(ValidationError, match="selects everything"):
        Selection(top_k=None)
    with pytest.raises(ValidationError, match="extra"):
        Selection.model_validate({"topk": 3})


def test_rank_correlation_and_recall() -> None:
    exact = np.array([[0.1, -5.0, 2.0], [0.3, 0.2, 4.0]])
    assert spearman(exact, exact**3) == pytest.approx(1.0)
    assert spearman(exact, -exact) == pytest.approx(-1.0)
    assert np.isnan(spearman(exact, np.zeros_like(exact)))
    scores = np.array([[9.0, -1.0, 0.0], [0.0, 0.0, -3.0]])
    assert recall(scores, exact, 2) == 0.5  # of -5 and 4 the scores find 4
    assert recall(-exact, exact, 3) == 1.0
    assert np.isnan(recall(scores, np.where(exact > 3, np.nan, exact), 2))
    assert spearman(np.array([1.0, 2.0, np.nan]), np.array([1.0, 3.0, 0.0])) == pytest.approx(1.0)


def test_areas_are_the_trapezoids_of_mib() -> None:
    """The figures that the benchmark's own loop gives: sum of (x2 - x1) times the mean of f, and of |1 - f|."""
    proportions = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    curve = np.array([0.1, -0.2, 0.3, 0.5, 1.4, 1.2, 0.9, 1.0, 1.1, 1.0])
    under = over = 0.0
    for at in range(len(curve) - 1):
        width = proportions[at + 1] - proportions[at]
        under += width * (curve[at] + curve[at + 1]) / 2
        over += width * (abs(1 - curve[at]) + abs(1 - curve[at + 1])) / 2
    assert areas(proportions, curve) == pytest.approx((under, over))
    assert areas(proportions, np.ones(10)) == pytest.approx((0.999, 0.0))
    sizes = sizes_of(proportions, 46080)
    assert sizes.tolist() == [46, 92, 230, 460, 921, 2304, 4608, 9216, 23040, 46080]
    assert size_reaching(sizes, curve) == 921
    assert size_reaching(sizes, curve, 1.1) == 921
    assert size_reaching(sizes, curve, 1.0, stays=True) == 9216
    assert size_reaching(sizes, curve / 10) is None
    np.testing.assert_allclose(normalised(np.array([1.0, 3.0]), 1.0, 3.0), [0, 1])
    assert np.isnan(normalised(np.array([1.0]), 2.0, 2.0)).all()


def test_masks_of_a_curve_keep_what_they_say() -> None:
    values = np.arange(24.0).reshape(2, 3, 4) * np.array([1, -1, 1, -1])
    sizes = np.array([1, 10, 24])
    masks = curve_masks(ranking(np.abs(values)), sizes, values.shape)
    assert masks["faithfulness"].sum(axis=(1, 2, 3)).tolist() == [1, 10, 24]
    assert (masks["completeness"] == ~masks["faithfulness"]).all()
    assert masks["minimality"].sum(axis=(1, 2, 3)).tolist() == [0, 9, 22]
    assert (masks["faithfulness"] | ~masks["minimality"]).all()
    assert np.abs(values)[masks["faithfulness"][1]].min() == 14


def test_random_circuits_have_the_same_layer_distribution() -> None:
    generator = np.random.default_rng(1)
    mask = generator.random((3, 2, 50)) < 0.1
    drawn = random_like(mask, 20, seed=3)
    assert (drawn.sum(axis=(2, 3)) == mask.sum(axis=(1, 2))).all()
    assert (drawn == random_like(mask, 20, seed=3)).all()
    assert (drawn != random_like(mask, 20, seed=4)).any()
    assert len({one.tobytes() for one in drawn}) == 20
