"""Taking a direction out of sites, one vector a base prompt, and log-odds of a set of tokens: against raw hooks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import CLEAN, CORRUPT, HEADS, LAYERS, WIDTH, Both, both, one_thread  # noqa: F401
from hooks_reference import Edit, computing

import nsp
from nsp.experiments.direction.interventions import directional_ablation
from nsp.interventions import from_dict, to_dict

LONG = [4, 8, 15, 16, 23, 42, 7, 9, 11, 13, 2]


@pytest.fixture(params=["llama", "gpt2"])
def pair_of(request: pytest.FixtureRequest) -> Both:
    return both(request.param)


def vector(seed: int, width: int = WIDTH) -> torch.Tensor:
    return 7.0 * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def without(direction: torch.Tensor) -> Any:
    """The projection in float64, written out."""
    unit = direction.double() / direction.double().norm()
    return lambda value: value - (value @ unit)[..., None] * unit


def test_a_direction_is_gone_from_a_site_and_the_rest_stays(pair_of: Both) -> None:
    direction = vector(0)
    with pair_of.model.trace(CORRUPT) as t:
        t.ablate("attn_out[1] @ 3", "direction", direction=direction)
        t.record("attn_out[1]")
    found = torch.tensor(t.results["attn_out"].sel(layer=1).values).double()
    before = pair_of.reference.values(CORRUPT, [("attn_out", 1)])["attn_out", 1][:, 0]
    assert abs(float(found[3] @ direction.double())) < 1e-4
    torch.testing.assert_close(found[3], without(direction)(before)[3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:3], before[:3], atol=1e-5, rtol=1e-5)
    assert t.receipts[0].fired == 1


@pytest.mark.parametrize("path", ["branch", "plain"])
@pytest.mark.parametrize("component", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_projection_agrees_with_hooks_on_both_paths(pair_of: Both, component: str, path: Any) -> None:
    direction = vector(1)
    with pair_of.model.trace(CORRUPT, path=path) as t:
        t.sweep(nsp.ablate(f"{component}[*] @ *", "direction", direction=direction), axes=("layer", "position"))
        t.measure(nsp.logit(4))
    for layer in range(LAYERS):
        for position in (0, 5, 8):
            edit = Edit(component, layer, computing(without(direction), [position]))
            expected = pair_of.reference.logits(CORRUPT, [edit])[-1, 4]
            assert float(t.results["logit"].sel(layer=layer, position=position)) == pytest.approx(float(expected), abs=1e-4)


def test_a_direction_of_one_head(pair_of: Both) -> None:
    direction = vector(2, WIDTH // HEADS)
    with pair_of.model.trace(CORRUPT) as t:
        t.ablate("z[1][2] @ 2,4", "direction", direction=direction)
        t.measure(nsp.logit(4))
    edit = Edit("z", 1, computing(without(direction), [2, 4], [2]))
    assert float(t.results["logit"]) == pytest.approx(float(pair_of.reference.logits(CORRUPT, [edit])[-1, 4]), abs=1e-4)


def test_directional_ablation_takes_every_write_of_the_residual_stream(pair_of: Both) -> None:
    direction = vector(3)
    stated = directional_ablation(pair_of.model, direction)
    edits = [Edit("embed", 0, computing(without(direction)))]
    for layer in range(LAYERS):
        edits += [Edit("attn_out", layer, computing(without(direction))), Edit("mlp_out", layer, computing(without(direction)))]
    with pair_of.model.trace(CORRUPT) as t:
        t.add(*stated)
        t.record("logits @ *")
    found = torch.tensor(t.results["logits"].values).double().reshape(len(CORRUPT), -1)
    torch.testing.assert_close(found, pair_of.reference.logits(CORRUPT, edits), atol=1e-4, rtol=1e-4)
    with pair_of.model.trace(CORRUPT) as t:
        t.add(*stated)
        t.record("resid_post[*]")
    stream = torch.tensor(t.results["resid_post"].values)
    assert float((stream @ (direction / direction.norm())).abs().max()) < 1e-4


def test_generation_without_a_direction_acts_on_prompt_and_generated_tokens(pair_of: Both) -> None:
    direction = vector(4)
    with pair_of.model.trace([CORRUPT, LONG]) as t:
        t.add(*directional_ablation(pair_of.model, direction))
        t.generate(6, when="both", stop=False)
    edits = [Edit("embed", 0, computing(without(direction)))]
    for layer in range(LAYERS):
        edits += [Edit("attn_out", layer, computing(without(direction))), Edit("mlp_out", layer, computing(without(direction)))]
    for row, prompt in enumerate((CORRUPT, LONG)):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(pair_of.reference.logits(ids, edits)[-1].argmax()))
        assert t.results["token_id"].values[row].tolist() == ids[len(prompt) :]


def test_one_vector_for_each_base_prompt(pair_of: Both) -> None:
    """Prompts of two lengths, each with its own direction, and its own added vector."""
    vectors = torch.stack([vector(5), vector(6)])
    with pair_of.model.trace([CORRUPT, LONG]) as t:
        t.ablate("resid_pre[1] @ *", "direction", direction=vectors[:, None])
        t.inject("resid_post[1] @ -1", vectors[:, None], coefficient=0.25)
        t.measure(nsp.logit(4))
    for row, prompt in enumerate((CORRUPT, LONG)):
        edits = [
            Edit("resid_pre", 1, computing(without(vectors[row]))),
            Edit("resid_post", 1, computing(lambda value, row=row: value + 0.25 * vectors[row].double(), [len(prompt) - 1])),
        ]
        expected = float(pair_of.reference.logits(prompt, edits)[-1, 4])
        assert float(t.results["logit"].values[row]) == pytest.approx(expected, abs=1e-4)


def test_a_vector_for_each_prompt_and_position(pair_of: Both) -> None:
    vectors = torch.stack([torch.stack([vector(seed), vector(seed + 1)]) for seed in (7, 9)])
    with pair_of.model.trace([CLEAN, CORRUPT]) as t:
        t.inject("resid_pre[2] @ 3,6", vectors)
        t.measure(nsp.logit(4))
    for row, prompt in enumerate((CLEAN, CORRUPT)):
        edits = [
            Edit("resid_pre", 2, computing(lambda value, row=row, place=place: value + vectors[row, place].double(), [position]))
            for place, position in enumerate((3, 6))
        ]
        expected = float(pair_of.reference.logits(prompt, edits)[-1, 4])
        assert float(t.results["logit"].values[row]) == pytest.approx(expected, abs=1e-4)


def test_plain_data_and_back(pair_of: Both) -> None:
    stated = nsp.ablate("mlp_out[1] @ *", "direction", direction=vector(11))
    again = from_dict(to_dict(stated))
    values = []
    for one in (stated, again):
        with pair_of.model.trace(CORRUPT) as t:
            t.add(one)
            t.measure(nsp.logit(4))
        values.append(float(t.results["logit"]))
    assert values[0] == values[1]
    assert to_dict(again) == to_dict(stated)
    assert "direction" not in to_dict(nsp.ablate("mlp_out[1]")), "plans of other ablations keep their hashes"
    assert pair_of.model.rerun(t.plan).results["logit"] == values[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nsp.ablate("resid_pre[1]", "direction"), "takes a direction"),
        (lambda: nsp.ablate("resid_pre[1]", "zero", direction=[1.0]), "takes no direction"),
        (lambda: nsp.ablate("resid_pre[1]", "direction", direction=np.zeros(4)), "points nowhere"),
        (lambda: nsp.ablate("resid_pre[1]", "direction", direction=[1.0, math.nan]), "NaN"),
    ],
)
def test_what_is_no_direction(make: Any, message: str) -> None:
    with pytest.raises(nsp.InputError, match=message):
        make()


def test_a_direction_of_another_width_names_the_site(pair_of: Both) -> None:
    with pytest.raises(nsp.InputError, match=r"resid_pre\[1\].*\(61,\)"):
        logit_without(pair_of, "resid_pre[1]", torch.ones(61))


def logit_without(of: Both, site: str, direction: torch.Tensor) -> float:
    with of.model.trace(CORRUPT) as t:
        t.ablate(site, "direction", direction=direction)
        t.measure(nsp.logit(4))
    return float(t.results["logit"])


def test_log_odds_of_a_set_of_tokens(pair_of: Both) -> None:
    logits = pair_of.reference.logits(CORRUPT)[-1]
    log_p = torch.log_softmax(logits, dim=0)
    inside = math.fsum(log_p[[4, 9, 30]].exp().tolist())
    with pair_of.model.trace(CORRUPT) as t:
        t.measure(nsp.log_odds(4, 9, 30), nsp.log_odds(9, name="one"))
    assert float(t.results["log_odds"]) == pytest.approx(math.log(inside / (1 - inside)), abs=1e-4)
    one = math.exp(float(log_p[9]))
    assert float(t.results["one"]) == pytest.approx(math.log(one / (1 - one)), abs=1e-4)


def test_log_odds_keep_both_ends() -> None:
    """Where the set has nearly all probability, or none, float32 log-probabilities would round to 0 or infinity."""
    from nsp.engine.kernels import metric_values

    logits = torch.full((2, 150_000), -30.0)
    logits[0, :2] = 30.0
    logits[1, 5] = 60.0
    found = metric_values("log_odds", logits, torch.tensor([[0, 1], [0, 1]]), None)
    rest = torch.tensor([149_998.0, 1.0], dtype=torch.float64).log() + torch.tensor([-30.0, 60.0], dtype=torch.float64)
    inside = torch.tensor([30.0, -30.0], dtype=torch.float64) + math.log(2)
    torch.testing.assert_close(found.double(), inside - rest, atol=1e-4, rtol=1e-6)
