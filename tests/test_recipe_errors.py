"""One mistake in a recipe is one line, also where a key takes several forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nsp
from nsp.experiments import EXPERIMENTS
from nsp.recipe import load_recipe_file
from nsp.recipe_errors import checked

KINDS = {kind: experiment.recipe_class for kind, experiment in EXPERIMENTS.items()}
DIRECTION = {"kind": "direction", "positive": ["a"] * 4, "negative": ["b"] * 4, "behaviour": {"openings": ["x"]}}
LOGIT = {"kind": "logit-attribution", "prompts": [{"prompt": "a", "answer": " b"}]}
ATTRIBUTION = {"kind": "attribution", "prompts": ["a"]}
PATCHING = {
    "kind": "activation-patching",
    "pairs": [{"clean": "a", "corrupt": "b", "answer": " c", "distractor": " d"}],
}


def lines(keys: dict[str, Any]) -> list[str]:
    with pytest.raises(nsp.InputError) as raised:
        checked(KINDS[keys["kind"]], keys)
    return [line.removeprefix(f"{keys['kind']}: ") for line in str(raised.value).splitlines()]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (DIRECTION | {"positions": "first"}, "positions: should be template, or a whole number, got 'first'"),
        (DIRECTION | {"positions": 0}, "positions: should be template, or 1 or more, got 0"),
        (LOGIT | {"position": [3]}, "position: should be a whole number, or last, got [3]"),
        (
            LOGIT | {"prompts": [{"prompt": "a", "answer": [1]}]},
            "prompts[0].answer: should be a text, or a whole number, got [1]",
        ),
        (
            LOGIT | {"prompts": [{"prompt": "a", "token": " b"}]},
            "unknown key 'token' in prompts[0]; missing here: 'answer'; valid here: prompt, answer, distractor",
        ),
        (
            LOGIT | {"prompts": {"path": "x.csv"}},
            "unknown key 'path' in prompts; missing here: 'set'; valid here: set, size, seed",
        ),
        (ATTRIBUTION | {"select": {"blacklist": 5}}, "select.blacklist: should be a path, or a list, got 5"),
        (ATTRIBUTION | {"select": {"blacklist": [[1]]}}, "select.blacklist[0]: has too few items"),
        (
            PATCHING | {"metric": {"kind": "logit", "tokens": [[]]}},
            "metric.tokens[0]: should be a text, or a whole number, got []",
        ),
        (PATCHING | {"metric": {"kynd": "logit"}}, "unknown key 'kynd' in metric; did you mean 'kind'?"),
    ],
)
def test_a_mistake_in_a_key_of_several_forms_is_one_line(keys: dict[str, Any], line: str) -> None:
    assert lines(keys) == [line]


def test_a_file_that_is_missing_says_so_where_a_list_would_do_too() -> None:
    (line,) = lines(ATTRIBUTION | {"select": {"blacklist": "nowhere.json"}})
    assert line.startswith("select.blacklist: the file ")
    assert line.endswith("nowhere.json does not exist")


def test_two_mistakes_stay_two_lines() -> None:
    # A recipe from Python has no lines, so mistakes stand in the order of the recipe's keys.
    assert lines(PATCHING | {"together": ["layer", "head"], "seed": -1}) == [
        "seed: should be greater than or equal to 0, got -1",
        "together[1]: 'head' is not valid (one of layer, position)",
    ]


def test_what_a_scan_makes_of_its_models_is_not_blamed_beside_them(tmp_path: Path) -> None:
    recipe = tmp_path / "scan.yaml"
    recipe.write_text("kind: bias-scan\nmodels:\n  aligned: {name: smollm2, dtype: float31}\nablate: mlp_out[3]\n")
    for overrides in ([], ["model.device=cpu"]):
        with pytest.raises(nsp.InputError) as raised:
            load_recipe_file(recipe, overrides, kinds=KINDS)
        (line,) = str(raised.value).splitlines()
        assert line.startswith(f"{recipe}:3: models.aligned.dtype: 'float31' is not valid; did you mean 'float32'?")


def test_a_key_in_python_is_not_asked_to_be_quoted_nor_to_extend_a_file() -> None:
    assert lines(PATCHING | {"name": 5}) == ["name: should be a text, got 5"]
    (line,) = lines(PATCHING | {"qqq": 5})
    assert "extends" not in line
