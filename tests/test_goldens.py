"""What every kind of experiment gives is what it gave (`goldens.py`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import goldens
import pytest
from golden_cases import CASES, SHIPPED

from nsp.recipe import shipped_recipes

QUICK = ("layer-recovery", "logit-attribution", "alignment-scan", "mean-activations", "contrast")
_MOST_BYTES = 2_000_000


@pytest.fixture(scope="module")
def workplace() -> Iterator[Path]:
    with goldens.workplace() as folder:
        yield folder


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_run_gives_what_it_gave(name: str, workplace: Path) -> None:
    assert goldens.check(name) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_every_run_gives_what_it_gave(name: str, workplace: Path) -> None:
    assert goldens.check(name) == []


def test_every_shipped_recipe_and_every_entry_is_kept() -> None:
    assert set(shipped_recipes()) == set(SHIPPED)
    kept = sorted(goldens.DATA.iterdir())
    assert sorted(map(goldens.path_of, CASES)) == kept
    assert sum(path.stat().st_size for path in kept) < _MOST_BYTES


def _changed(kept: Any, *keys: Any, to: Any) -> Any:
    made = copy.deepcopy(kept)
    place = made
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return made


def test_a_change_is_told_by_name() -> None:
    kept = goldens.read("layer-recovery")
    assert goldens.differences(kept, kept) == []
    variables = ("run", "groups", "/effects/attn_out", "variables")
    effect = kept["run"]["groups"]["/effects/attn_out"]["variables"]["effect"]
    moved = [effect["values"][0] + 0.01 * effect["scale"], *effect["values"][1:]]
    for keys, value, said in (
        (("run", "plan_hash"), "0", "plan_hash: '"),
        ((*variables, "effect", "values"), moved, "effects/attn_out/effect: 1 of 16 values differ"),
        ((*variables, "effect", "dims"), ["pair"], "effects/attn_out/effect/dims: 2 entries are 1 now"),
        ((*variables, "effect", "attrs"), {}, "effects/attn_out/effect/attrs/long_name is gone"),
        (("run", "groups"), {}, "effects/attn_out is gone"),
        (("show", 0), "another title", "show[0]: 'activation patching, denoising' is 'another title' now"),
    ):
        lines = goldens.differences(kept, _changed(kept, *keys, to=value))
        assert any(line.startswith(said) for line in lines), lines


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("effect 0.436 of 18", "effect 0.437 of 18", True),
        ("effect 0.436 of 18", "effect 0.439 of 18", False),
        ("effect 0.436 of 18", "effect 0.436 of 19", False),
        ("4.8e-07 apart", "0 apart", True),
        ("layer 12", "layer 13", False),
        ("sum 6.1", "product 6.1", False),
    ],
)
def test_printed_numbers_may_differ_in_their_last_digit(before: str, now: str, same: bool) -> None:
    assert (goldens.differences(before, now) == []) is same
