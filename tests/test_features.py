"""Named features: found, kept whole, read back on the same weights only, and steered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import CLEAN, CORRUPT, both, model, one_thread, text

import nsp
from nsp.errors import InputError
from nsp.experiments import contrast, control_vectors, steering
from nsp.experiments.feature_store import Feature, FeatureStore, features_dir, model_of

__all__ = ["one_thread"]
SETS: dict[str, Any] = {
    "positive": [text(CLEAN), text([1, 2, 3]), text([4, 5, 6, 7]), text([9, 10, 11])],
    "negative": [text(CORRUPT), text([1, 2, 5]), text([4, 5, 6, 8]), text([9, 10, 12])],
}


def test_two_sets_give_a_vector_that_is_kept(tmp_path: Path) -> None:
    llama = both("llama").model
    made = nsp.find_feature(llama, name="mood", layer=1, store=tmp_path, **SETS)
    tree = contrast(llama, SETS["positive"], SETS["negative"], components="resid_post", resamples=2)
    assert made.target.vectors is not None
    assert np.array_equal(made.target.vectors.values, control_vectors(tree, "resid_post", [1]).values)
    assert made.source["layer"] == 1
    kept = FeatureStore(tmp_path).load("mood", llama)
    assert kept.target == made.target
    assert kept.source == made.source
    assert FeatureStore(tmp_path).names(llama) == ("mood",)
    assert "adding the mood (mean_difference) to resid_post of layer 1" in str(kept)


def test_without_a_layer_the_one_that_separates_best_is_taken(tmp_path: Path) -> None:
    llama = both("llama").model
    made = nsp.find_feature(llama, name="mood", store=tmp_path, **SETS)
    tree = contrast(llama, SETS["positive"], SETS["negative"], components="resid_post", resamples=2)
    scores = tree["attribution/resid_post"]["separation"].values
    assert made.source["layer"] == int(scores[:2].argmax())  # not the last of three layers
    two = {key: value[:2] for key, value in SETS.items()}  # too few to hold any out
    assert nsp.find_feature(llama, name="few", store=tmp_path, **two).source["layer"] == 1


def test_a_prompt_gives_a_circuit(tmp_path: Path) -> None:
    llama = both("llama").model
    made = nsp.find_feature(llama, name="answer", prompt=text(CLEAN), target="w3", top_k=5, store=tmp_path)
    assert made.target.circuit is not None
    assert len(made.target.circuit) == 5
    kept = FeatureStore(tmp_path).load("answer", llama)
    assert kept.target.circuit is not None
    assert kept.target.circuit.units == made.target.circuit.units
    found = nsp.steer(llama, text(CLEAN), feature="answer", multiplier=1, max_new_tokens=4, store=tmp_path)
    assert found.text == found.plain


def test_steering_by_name_is_steering_by_value(tmp_path: Path) -> None:
    llama = both("llama").model
    feature = nsp.find_feature(llama, name="mood", layer=1, store=tmp_path, **SETS)
    found = nsp.steer(llama, text(CORRUPT), feature="mood", multiplier=3, max_new_tokens=5, store=tmp_path)
    tree = steering(llama, text(CORRUPT), feature=feature.target, multipliers=[3], decoding={"max_new_tokens": 5})
    assert found.text == tree["generations"]["text"].values[0, 1]
    assert found.plain == tree["generations"]["text"].values[0, 0]
    assert found.top[0][1] == pytest.approx(float(tree["effects/next_token"]["top_prob"].values[0, 1, 0]))
    assert str(found) == found.text
    assert nsp.steer(llama, text(CORRUPT), feature=feature, multiplier=3, max_new_tokens=5).text == found.text
    neutral = nsp.steer(llama, text(CORRUPT), feature=feature, multiplier=0, max_new_tokens=5)
    assert neutral.text == neutral.plain


def test_a_recipe_can_name_a_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = both("llama").model
    monkeypatch.setenv("NSP_FEATURES", str(tmp_path))
    assert features_dir() == tmp_path
    feature = nsp.find_feature(llama, name="mood", layer=1, **SETS)
    named = steering(llama, text(CORRUPT), feature="mood", decoding=None)
    given = steering(llama, text(CORRUPT), feature=feature.target, decoding=None)
    assert np.array_equal(named["effects/next_token"]["kl"].values, given["effects/next_token"]["kl"].values)


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    llama = both("llama").model
    first = nsp.find_feature(llama, name="mood", layer=0, store=tmp_path, **SETS)
    with pytest.raises(InputError, match="already"):
        nsp.find_feature(llama, name="mood", layer=1, store=tmp_path, **SETS)
    store = FeatureStore(tmp_path)
    assert store.load("mood", llama).target == first.target
    second = nsp.find_feature(llama, name="mood", layer=1, store=tmp_path, force=True, **SETS)
    assert store.load("mood", llama).target == second.target
    store.remove("mood", llama)
    assert store.names(llama) == ()
    with pytest.raises(InputError, match="there is none yet"):
        store.load("mood", llama)
    assert not list(tmp_path.rglob(".*.partial"))


def test_features_of_other_weights_are_refused(tmp_path: Path) -> None:
    llama, other = both("llama").model, model("llama", seed=7)
    nsp.find_feature(llama, name="mood", layer=1, store=tmp_path, **SETS)
    with pytest.raises(InputError, match="other weights"):
        FeatureStore(tmp_path).load("mood", other)


def test_a_misspelt_name_gets_a_hint(tmp_path: Path) -> None:
    llama = both("llama").model
    nsp.find_feature(llama, name="cheerful", layer=1, store=tmp_path, **SETS)
    with pytest.raises(InputError, match="did you mean 'cheerful'"):
        nsp.steer(llama, text(CLEAN), feature="cherful", multiplier=1, store=tmp_path)
    for name in ("../up", "", "a/b", ".hidden", "x" * 99):
        with pytest.raises(InputError):
            Feature(name, FeatureStore(tmp_path).load("cheerful", llama).target, model_of(llama))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    llama = both("llama").model
    nsp.find_feature(llama, name="mood", layer=1, store=tmp_path, **SETS)
    (place,) = tmp_path.rglob("*.json")
    data = json.loads(place.read_text())
    for broken in ("{", json.dumps({**data, "format": "other"}), json.dumps({**data, "version": 9}), json.dumps({**data, "target": {}})):
        place.write_text(broken)
        with pytest.raises(InputError, match=r"mood\.json"):
            FeatureStore(tmp_path).load("mood", llama)


@pytest.mark.parametrize(
    "options",
    [{}, {"positive": ["w1"]}, {**SETS, "prompt": "w1"}, {**SETS, "target": "w1"}, {"prompt": "w1 w2", "layer": 1}],
)
def test_a_feature_is_found_in_one_of_two_ways(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        nsp.find_feature(both("llama").model, name="x", store=tmp_path, **options)
    assert not list(tmp_path.rglob("*.json"))
