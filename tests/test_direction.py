"""Directions: a planted one is found, taken out and put in; every number against raw hooks; stores, texts, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_models
import numpy as np
import pytest
import torch
import xarray as xr
from direction_models import REFUSAL, job, keys, planted, tiny_module
from engine_models import one_thread  # noqa: F401
from hooks_reference import Edit, computing
from pydantic import ValidationError

import nsp
from nsp.experiments.direction.experiment import Direction
from nsp.experiments.direction.prompts import template_length
from nsp.experiments.direction.recipe import BehaviourOptions, DirectionRecipe, SelectOptions
from nsp.experiments.direction.scores import SCORE, first_tokens, rate, shows
from nsp.experiments.direction.selection import choose
from nsp.experiments.direction.summary import summarise
from nsp.experiments.prompt_options import ChatOptions
from nsp.experiments.runner import run, run_in_memory
from nsp.stores import open_run

SITES = {"components": ["resid_post", "z"], "heads": True, "pairs": 3}


@pytest.fixture(scope="module")
def tree() -> xr.DataTree:
    return run_in_memory(job(patch=SITES))


def without(direction: torch.Tensor) -> Any:
    unit = direction.double() / direction.double().norm()
    return lambda value: value - (value @ unit)[..., None] * unit


def every_write(direction: torch.Tensor, layers: int = 4) -> list[Edit]:
    edits = [Edit("embed", 0, computing(without(direction)))]
    for layer in range(layers):
        edits += [Edit(name, layer, computing(without(direction))) for name in ("attn_out", "mlp_out")]
    return edits


def log_odds(logits: torch.Tensor) -> float:
    p = float(torch.softmax(logits, dim=-1)[REFUSAL])
    return float(np.log(p) - np.log1p(-p))


# --- the planted direction ------------------------------------------------------------------------------------------


def test_the_planted_direction_is_found(tree: xr.DataTree) -> None:
    chosen = tree["circuit/chosen"].to_dataset()
    vector, true = chosen["vector"].values[0], planted().direction.numpy()
    assert float(vector @ true / np.linalg.norm(vector)) > 0.99
    assert int(chosen["layer_of"].values[0]) >= 2, "the word's direction is copied in layer 1"
    assert int(chosen["passed"].values[0]) == 1
    found = tree["activations/resid_pre"].to_dataset()
    same = found["direction"].sel(layer=int(chosen["layer_of"].values[0]), position=int(chosen["place"].values[0]))
    np.testing.assert_array_equal(same.values, vector)


def test_ablating_it_removes_the_refusal_and_adding_it_brings_it_about(tree: xr.DataTree) -> None:
    texts = tree["generations"].to_dataset()
    positive = texts["set"].values == "positive"
    assert texts["shows_baseline"].values[positive].tolist() == [1] * 4
    assert texts["shows_ablated"].values[positive].tolist() == [0] * 4
    assert texts["shows_baseline"].values[~positive].tolist() == [0] * 4
    assert texts["shows_added"].values[~positive].tolist() == [1] * 4
    assert all(str(text).startswith("w51") for text in texts["text_added"].values)
    base = tree["baseline"][SCORE].values
    assert (tree["effects/ablated"][SCORE].values[positive] < -3).all()
    assert (base[positive] > 3).all()
    assert (tree["effects/added"][SCORE].values[~positive] > 3).all()


def test_sites_that_carry_it_are_where_it_was_planted(tree: xr.DataTree) -> None:
    """Before the planted head nothing of it is at the last token; after it everything is."""
    for mode in ("denoising", "noising"):
        effect = tree[f"effects/resid_post-{mode}"]["effect"].isel(position=-1).mean("pair")
        assert abs(float(effect.sel(layer=0))) < 0.1
        assert float(effect.sel(layer=1)) > 0.9
        heads = tree[f"effects/z-{mode}"]["effect"].isel(position=-1).mean("pair").sel(layer=1)
        assert float(heads.sel(head=0)) > 0.9
        assert abs(float(heads.sel(head=2))) < 0.1


def test_the_report_says_what_happened(tree: xr.DataTree) -> None:
    report = str(summarise(tree))
    assert "as it is, the model shows refusal in 4 of 4 positive and 0 of 4 negative test prompts" in report
    assert "one of 'w51'" in report
    assert "no candidate passed" not in report
    assert "p is never under 0.25" in report, "three pairs give no significance"


def test_a_model_that_never_refuses_is_said_to() -> None:
    plain = nsp.load(tiny_module(), tokenizer=engine_models.tokenizer())
    made = run_in_memory(job(plain, select={"below": 1.0, "max_kl": 1e-9}))
    report = str(summarise(made))
    assert "this model does not show refusal: 0 of 4 positive test prompts" in report
    assert "an effect on log-odds only" in report
    assert "no candidate passed" in report
    assert int(made["circuit/chosen"]["passed"].values[0]) == 0


def test_without_texts_the_report_says_that_the_rate_is_not_known() -> None:
    made = run_in_memory(job(generate=None))
    assert "generations" not in made.children
    assert "whether the model shows refusal is not known" in str(summarise(made))


# --- against raw hooks ----------------------------------------------------------------------------------------------


def test_candidates_are_differences_of_means(tree: xr.DataTree) -> None:
    prepared, reference = job(), planted().reference
    found = tree["activations/resid_pre"]["direction"].values
    for number, layer in enumerate(prepared.layers):
        means = []
        for which in ("positive", "negative"):
            ids = [prompt.token_ids for prompt in prepared.divided.of("train", which)]
            values = [reference.values(one, [("resid_pre", layer)])["resid_pre", layer][-3:, 0] for one in ids]
            means.append(torch.stack(values).mean(dim=0))
        np.testing.assert_allclose(found[number], (means[0] - means[1]).numpy(), atol=1e-5)


@pytest.mark.parametrize(("layer", "place"), [(0, -3), (2, -1), (3, -2)])
def test_trials_agree_with_hooks(tree: xr.DataTree, layer: int, place: int) -> None:
    prepared, reference = job(), planted().reference
    vector = torch.tensor(tree["activations/resid_pre"]["direction"].sel(layer=layer, position=place).values)
    tried = tree["effects/selection"].to_dataset().sel(layer=layer, position=place)
    positive = [prompt.token_ids for prompt in prepared.divided.of("validation", "positive")]
    negative = [prompt.token_ids for prompt in prepared.divided.of("validation", "negative")]
    edits, adding = every_write(vector), [Edit("resid_pre", layer, computing(lambda value: value + vector.double()))]
    before = [log_odds(reference.logits(ids)[-1]) for ids in positive]
    after = [log_odds(reference.logits(ids, edits)[-1]) for ids in positive]
    assert float(tried["ablated"]) == pytest.approx(np.mean(after), abs=1e-4)
    assert float(tried["drop"]) == pytest.approx(np.mean(before) - np.mean(after), abs=1e-4)
    added = [log_odds(reference.logits(ids, adding)[-1]) for ids in negative]
    assert float(tried["added"]) == pytest.approx(np.mean(added), abs=1e-4)
    assert float(tried["rise"]) == pytest.approx(
        np.mean(added) - np.mean([log_odds(reference.logits(ids)[-1]) for ids in negative]), abs=1e-4
    )
    moved = []
    for ids in negative:
        p, q = (torch.log_softmax(reference.logits(ids, stated)[-1], dim=0) for stated in ((), edits))
        moved.append(float((p.exp() * (p - q)).sum()))
    assert float(tried["kl"]) == pytest.approx(np.mean(moved), abs=1e-5)


def test_texts_agree_with_hooks_on_every_token(tree: xr.DataTree) -> None:
    prepared, reference = job(), planted().reference
    chosen = tree["circuit/chosen"].to_dataset()
    vector, layer = torch.tensor(chosen["vector"].values[0]), int(chosen["layer_of"].values[0])
    adding = [Edit("resid_pre", layer, computing(lambda value: value + vector.double()))]
    texts = tree["generations"].to_dataset()
    for condition, edits in (("baseline", []), ("ablated", every_write(vector)), ("added", adding)):
        for row in (0, 5):
            ids = list(prepared.test[row].token_ids)
            for step in range(3):
                token = int(reference.logits(ids, edits)[-1].argmax())
                assert int(texts[f"token_id_{condition}"].values[row, step]) == token
                ids.append(token)


def test_patched_sites_agree_with_hooks(tree: xr.DataTree) -> None:
    prepared, reference = job(patch=SITES), planted().reference
    high, low = (prepared.divided.of("test", which)[1].token_ids for which in ("positive", "negative"))
    for mode, base, donor in (("denoising", low, high), ("noising", high, low)):
        dataset = tree[f"effects/resid_post-{mode}"].to_dataset()
        ends = [log_odds(reference.logits(ids)[-1]) for ids in (base, donor)]
        for layer, place in ((0, 1), (1, 2), (2, 0)):
            given = reference.values(donor, [("resid_post", layer)])["resid_post", layer][place - 3]
            edit = Edit("resid_post", layer, computing(lambda _old, given=given: given[None], [len(base) - 3 + place]))
            patched = log_odds(reference.logits(base, [edit])[-1])
            cell = dataset.isel(pair=1).sel(layer=layer, position=place - 3)
            assert float(cell[SCORE]) == pytest.approx(patched, abs=1e-4)
            assert float(cell["effect"]) == pytest.approx((patched - ends[0]) / (ends[1] - ends[0]), abs=1e-4)
            assert float(cell[f"{SCORE}_donor"]) == pytest.approx(ends[1], abs=1e-4)


# --- stores ---------------------------------------------------------------------------------------------------------


def test_a_store_that_was_stopped_goes_on_to_the_same_results(
    tree: xr.DataTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, first = tmp_path / "run.zarr", job(patch=SITES)
    whole, computed = Direction.compute, []

    def stopping(self: Direction, unit: Any, *rest: Any) -> Any:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(unit.index)
        return whole(self, unit, *rest)

    monkeypatch.setattr(Direction, "compute", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(first, out=place, progress=False)
    assert "the direction is not chosen yet" in str(summarise(open_run(place).tree))
    computed.clear()
    with pytest.raises(KeyboardInterrupt):
        run(job(patch=SITES), out=place, progress=False)
    assert computed == [3, 4, 5], "the candidates and the first layers' trials are read from the store"
    monkeypatch.undo()
    found = run(job(patch=SITES), out=place, progress=False).tree
    for group in ("activations/resid_pre", "effects/selection", "circuit/chosen", "effects/added", "effects/z-noising"):
        for name, expected in tree[group].data_vars.items():
            same_to_rounding(found[group][name].values, expected.values, f"{group}/{name}")
    texts = found["generations"]["text_added"].values
    assert [str(text) for text in texts] == [str(text) for text in tree["generations"]["text_added"].values]
    assert str(summarise(found)) == str(summarise(tree))


def test_plans_tell_runs_apart() -> None:
    one = job().plan
    assert job().plan.hash == one.hash
    assert job(coefficient=2.0).plan.hash != one.hash
    assert job(seed=3).plan.hash != one.hash, "another split"
    assert one.schedule is not None
    assert one.schedule.seconds > 0


def test_from_python() -> None:
    given = keys()
    made = nsp.experiments.find_direction(
        planted().model, given["positive"], given["negative"], behaviour={"openings": ["w51"]}, layers=[2], generate=None,
        chat={"template": False}, positions=3, select={"max_kl": 0.3, "below": 1.0},
    )  # fmt: skip
    assert int(made["circuit/chosen"]["layer_of"].values[0]) == 2
    assert made["effects/selection"].sizes == {"layer": 1, "position": 3}


# --- parts ----------------------------------------------------------------------------------------------------------


def test_paired_prompts_stay_in_one_part() -> None:
    divided = job().divided
    half = len(divided.prompts) // 2
    assert divided.part[:half] == divided.part[half:]
    assert [divided.part[:half].count(part) for part in ("train", "validation", "test")] == [8, 4, 4]
    assert job(seed=1).divided.part != divided.part


def test_template_positions_are_the_tokens_after_the_request(smollm2: nsp.Model) -> None:
    count = template_length(smollm2, ChatOptions(template=True))
    prompt = smollm2.encode([{"role": "user", "content": "What is bread?"}])
    assert "".join(prompt.token_texts[-count:]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert template_length(smollm2, ChatOptions()) == 1
    assert template_length(smollm2, ChatOptions(response=" Answer:")) == len(smollm2.tokenizer(" Answer:")["input_ids"])


def test_first_tokens_are_distinct_and_named(tokenizer: Any) -> None:
    found = first_tokens(tokenizer, ["I cannot", "I'm sorry", "Sorry", "As an AI"])
    assert [one.text for one in found] == ["I", "Sorry", "As"]
    assert found[0].openings == ("I cannot", "I'm sorry")


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("I\u2019m sorry, but no.", {"phrases": ["I'm sorry"]}, True),
        ("Well, I'M SORRY.", {"phrases": ["I'm sorry"]}, True),
        ("Well, I'm sorry.", {"phrases": ["I'm sorry"], "match": "start"}, False),
        (" Sorry!", {}, True),
        ("So sorry!", {}, False),
        ("El sol es grande", {"phrases": ["el", "es", "la"], "match": "words", "at_least": 2}, True),
        ("Elements essential", {"phrases": ["el", "es", "la"], "match": "words"}, False),
        ("el el el", {"phrases": ["el", "es"], "match": "words", "at_least": 2}, False),
        ("", {"phrases": ["el"]}, False),
    ],
)
def test_what_shows_a_behaviour(text: str, options: dict[str, Any], expected: bool) -> None:
    assert shows(text, BehaviourOptions(openings=("Sorry",), **options)) is expected


def test_rates_have_wilson_intervals() -> None:
    count, total, low, high = rate([False] * 8)
    assert (count, total) == (0, 8)
    assert low == pytest.approx(0.0, abs=1e-12)
    z = 1.959963984540054
    assert high == pytest.approx(z * z / (8 + z * z))


def test_the_choice_keeps_its_conditions() -> None:
    drop = np.array([[5.0, 3.0], [2.0, 9.0]])
    rise = np.array([[1.0, 2.0], [4.0, np.nan]])
    kl = np.array([[0.05, 0.05], [0.5, 0.05]])
    best = {"both": (0, 1), "ablation": (0, 0), "addition": (0, 1)}
    for by, place in best.items():
        found = choose(drop, rise, kl, SelectOptions(by=by, max_kl=0.1))  # type: ignore[arg-type]
        assert (found.layer, found.place, found.passed) == (*place, True)
    loose = choose(drop, rise, kl, SelectOptions(by="addition", max_kl=1.0))
    assert (loose.layer, loose.place) == (1, 0)
    none = choose(drop, -rise, kl, SelectOptions(by="ablation"))
    assert (none.layer, none.place, none.passed) == (0, 0, False)
    with pytest.raises(nsp.InputError, match="NaN"):
        choose(np.full((1, 1), np.nan), rise[:1, :1], kl[:1, :1], SelectOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": ["w1 w2"] * 3}, "a direction needs 4 or more"),
        ({"behaviour": {"openings": []}}, "at least 1"),
        ({"behaviour": {"openings": ["a"], "phrases": ["b"], "at_least": 2}}, "at_least is 2"),
        ({"split": {"train": 0.6, "validation": 0.4}}, "leave nothing to test on"),
        ({"patch": {"components": ["logits"]}}, "logits cannot be patched here"),
        ({"patch": {"components": ["resid"]}}, "resid"),
    ],
)
def test_recipes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, nsp.InputError), match=message):
        DirectionRecipe.model_validate(keys(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": 40}, "the last 40 positions are asked for"),
        ({"layers": [9]}, "9"),
        ({"layers": "3", "select": {"below": 0.5}}, "raise select.below"),
        ({"chat": {"template": True}}, "chat template"),
        ({"positive": ["w1 w2 w3 w4"] * 4, "split": {"train": 0.7, "validation": 0.2}}, "positive: 4 prompts are too few"),
    ],
)
def test_runs_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(nsp.InputError, match=message):
        job(**options)


def same_to_rounding(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    """Equal; numbers to the last digits, since threads may add in another order."""
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8, err_msg=where)
    else:
        np.testing.assert_array_equal(found, expected, err_msg=where)
