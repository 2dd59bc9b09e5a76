"""Attribution scores: exact on a linear model, right signs and shapes on others, edges that sum to their senders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine_models import CLEAN, CORRUPT, HEADS, LAYERS, NEURONS, model, module, one_thread, reference, tokenizer  # noqa: F401
from tiny_architectures import CASES, tiny_model

import nsp
from nsp.datasets.prompts import Prompt
from nsp.engine.budget import Budget
from nsp.engine.donors import Donor, donor_values
from nsp.engine.edges import check_edges, edge_attribution, receiver_names, sender_names, sender_slots
from nsp.engine.engine import Engine
from nsp.engine.gradients import Objective
from nsp.engine.masked_ablation import MaskedRuns
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.experiments.attribution.scores import NODE_METHODS, Scored, edge_scores, node_scores
from nsp.metrics import logit_diff
from nsp.sites import Site
from nsp.trace import default_axes

BASE, OTHER = Prompt.from_ids(CLEAN), Prompt.from_ids(CORRUPT)
TOKENS = torch.tensor([[4, 9]])
DONORS = {
    "zero": Donor("zero"),
    "mean": Donor("mean", ([3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2])),
    "counterfactual": Donor("counterfactual", prompts=(OTHER,)),
    "mean from the end": Donor(
        "mean", tuple(map(Prompt.from_ids, (CORRUPT, [3, 1, *CORRUPT], [4, *CORRUPT[::-1]]))), over="end"
    ),
    "resample from the end": Donor("resample", (OTHER, Prompt.from_ids([4, *CORRUPT[::-1]])), seed=1, over="end"),
}
COMPONENTS = ["mlp_neurons", "z", "v", "attn_out", "mlp_out", "resid_pre", "resid_post", "embed", "mlp_up"]


def linear_model() -> nsp.Model:
    """A GPT-2 in which every site has a linear effect: no norms, no activation function, attention that looks everywhere alike."""
    made = module("gpt2", dtype=torch.float64, activation_function="linear", initializer_range=0.1)
    made.transformer.ln_f = torch.nn.Identity()
    for block in made.transformer.h:
        block.ln_1, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
        width = block.attn.c_attn.weight.shape[0]
        with torch.no_grad():
            block.attn.c_attn.weight[:, : 2 * width] = 0
            block.attn.c_attn.bias[: 2 * width] = 0
    return nsp.load(made, tokenizer=tokenizer())


def scored(donor: str, prompt: Prompt = BASE, steps: int = 3) -> Scored:
    return Scored(prompt, Objective("logit_diff", TOKENS, (len(prompt) - 1,)), DONORS[donor], steps)


def exact_effects(of: nsp.Model, selector: str, donor: str) -> np.ndarray:
    """Effects of the engine's exact sweep, (layer, position, unit)."""
    site = Site.parse(selector)
    intervention = DONORS[donor].intervention(of.runtime, site, [BASE])
    request = Request((BASE,), (intervention,), (logit_diff(4, 9),), (TOKENS,), axes=default_axes(site))
    measured = of.engine.measure(of.engine.plan(request))
    return np.asarray(measured.values[0][0] - measured.base[0][0])


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("method", NODE_METHODS)
def test_every_method_is_exact_on_a_linear_model(method: str, donor: str) -> None:
    of = linear_model()
    for component in COMPONENTS:
        units = "[*]" if component in ("mlp_neurons", "z", "v", "mlp_up") else ""
        layers = "" if component == "embed" else "[*]"
        found = node_scores(of.engine, scored(donor), Site.parse(f"{component}{layers} @ *"), method)
        exact = exact_effects(of, f"{component}{layers}{units} @ *", "zero" if method == "grad_x_act" else donor)
        assert found.shape == exact.shape
        np.testing.assert_allclose(found, exact, atol=1e-6, err_msg=component)
        assert np.abs(exact).max() > 1e-3


def test_edges_are_exact_on_a_linear_model() -> None:
    """A sender's effect, all at once, is the sum of its edges; and its edge to the logits is what it says to them directly."""
    of = linear_model()
    for donor in DONORS:
        found = edge_scores(of.engine, scored(donor))
        sums = np.nansum(found, axis=1)
        heads = exact_effects(of, "z[*][*] @ *", donor).sum(axis=1)
        mlps = exact_effects(of, "mlp_out[*] @ *", donor).sum(axis=1)[:, 0]
        expected = [exact_effects(of, "embed @ *", donor).sum()]
        for layer in range(LAYERS):
            expected += [*heads[layer], mlps[layer]]
        np.testing.assert_allclose(sums, expected, atol=2e-6)
        assert np.isnan(found).any()
        assert np.isfinite(found[:, -1]).all()


@pytest.mark.parametrize("case", CASES)
def test_edges_sum_to_their_senders_on_every_family(case: str) -> None:
    """The chain rule: exact for gradients of any model whose stream is a sum."""
    module: Any = tiny_model(case)
    if hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("eager")
    runtime = Runtime(module.double(), None)
    prompt = Prompt.from_ids([5, 11, 23, 7, 40, 31, 3, 58])
    of = Scored(prompt, Objective("logit_diff", TOKENS, (7,)), Donor("zero"))
    if case in ("opt-post-norm", "bloom-post-norm", "mamba", "jamba"):
        with pytest.raises(InputError, match="edges need"):
            check_edges(runtime)
        return
    found = edge_scores(Engine(runtime), of)
    names = sender_names(runtime)
    assert found.shape == (len(names), len(receiver_names(runtime)))
    sums = dict(zip(names, np.nansum(found.astype(np.float64), axis=1), strict=True))
    heads = node_scores(Engine(runtime), of, Site.parse("z @ *"), "atp").sum(axis=1)
    mlps = node_scores(Engine(runtime), of, Site.parse("mlp_out @ *"), "atp").sum(axis=1)[:, 0]
    largest = max(abs(value) for value in sums.values())
    assert abs(sums["embed"] - node_scores(Engine(runtime), of, Site.parse("embed @ *"), "atp").sum()) < 1e-4 * largest
    for layer in range(runtime.geometry.n_layers):
        assert abs(sums[f"mlp_out[{layer}]"] - mlps[layer]) < 1e-4 * largest
        for head in range(runtime.geometry.n_heads):
            assert abs(sums[f"z[{layer}][{head}]"] - heads[layer, head]) < 1e-4 * largest


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_integration_converges_to_the_exact_effect_of_a_site(family: str) -> None:
    """Integrated gradients at a site are complete: with many steps they sum to the effect of replacing the whole site."""
    of = model(family, dtype=torch.float64)
    for donor in DONORS:
        summed = node_scores(of.engine, scored(donor, steps=100), Site.parse("mlp_neurons @ last"), "atp_ig").sum(
            axis=2
        )
        exact = exact_effects(of, "mlp_neurons[*] @ last", donor)[..., 0]
        np.testing.assert_allclose(summed, exact, atol=2e-3 * max(1.0, np.abs(exact).max()))
        if donor == "zero":
            continue  # the line to zero embeddings ends where the first norm's gradient is infinite
        embedded = node_scores(of.engine, scored(donor, steps=200), Site.parse("embed @ *"), "eap_ig").sum()
        whole = masked_embedding_effect(of, donor)
        assert abs(embedded - whole) < 0.02 * max(1.0, abs(whole))


def test_layers_before_the_interpolated_one_need_not_run() -> None:
    of, other = model("llama"), model("llama")
    other.runtime.branch_refusal = "left out for this test"
    for component in ("mlp_neurons", "resid_post", "z"):
        both = [
            node_scores(one.engine, scored("mean"), Site.parse(f"{component} @ last"), "atp_ig") for one in (of, other)
        ]
        np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-6)


def masked_embedding_effect(of: nsp.Model, donor: str) -> float:
    intervention = DONORS[donor].intervention(of.runtime, "embed @ *", [BASE])
    measured = of.engine.measure(of.engine.plan(Request((BASE,), (intervention,), (logit_diff(4, 9),), (TOKENS,))))
    return float(measured.by_branch[0][0] - measured.base[0][0])


@pytest.mark.parametrize("donor", DONORS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masked_sets_of_units_are_what_interventions_make(family: str, donor: str) -> None:
    of = model(family)
    runs = MaskedRuns(of.runtime, BASE, logit_diff(4, 9), TOKENS, Budget.of("1GB", of.runtime.device))
    generator = np.random.default_rng(0)
    for component, count in (("mlp_neurons", NEURONS), ("z", HEADS)):
        kept = generator.random((3, LAYERS, 2, count)) < 0.7
        kept[2] = True
        found = runs.run(Site.parse(f"{component}[*] @ 3,8"), DONORS[donor], kept)
        for number in range(2):
            with of.trace(CLEAN) as trace:
                for layer, place in np.ndindex(LAYERS, 2):
                    units = np.flatnonzero(~kept[number, layer, place])
                    if len(units):
                        site = f"{component}[{layer}][{','.join(map(str, units))}] @ {(3, 8)[place]}"
                        trace.add(DONORS[donor].intervention(of.runtime, site, [BASE]))
                trace.measure(logit_diff(4, 9))
            np.testing.assert_allclose(found[number], float(trace.results["logit_diff"]), atol=2e-4)
        assert found[2] == pytest.approx(runs.base, abs=1e-6)
    with pytest.raises(InputError, match="the masks have"):
        runs.run(Site.parse("mlp_neurons[*] @ last"), DONORS[donor], kept)


def test_donors_from_the_end_are_what_stands_there() -> None:
    of = model("llama")
    given = [CORRUPT, [3, 1, *CORRUPT], [4, *CORRUPT[::-1]]]
    found = donor_values(of.runtime, Site.parse("mlp_neurons[1] @ 2,8"), [BASE], DONORS["mean from the end"])[
        "mlp_neurons", 1
    ][0]
    values = [reference(of).values(ids, [("mlp_neurons", 1)])["mlp_neurons", 1][:, :, 0] for ids in given]
    for place, back in ((2, 7), (8, 1)):
        expected = torch.stack([one[len(one) - back] for one in values]).mean(dim=0)
        torch.testing.assert_close(found[place].double(), expected, rtol=1e-4, atol=1e-5)
    assert not found[3].any()
    with pytest.raises(InputError, match="no reference prompt is that long"):
        donor_values(of.runtime, Site.parse("z @ 0"), [BASE], Donor("mean", (Prompt.from_ids([1, 2]),), over="end"))
    with pytest.raises(InputError, match="needs reference prompts"):
        Donor("mean", over="end")


def test_what_cannot_be_attributed_is_one_clear_error() -> None:
    of = model("llama")
    with pytest.raises(InputError, match="logits are what is measured"):
        node_scores(of.engine, scored("zero"), Site.parse("logits @ last"), "atp")
    with pytest.raises(InputError, match="leave the units out"):
        node_scores(of.engine, scored("zero"), Site.parse("z[*][1] @ last"), "atp")
    with pytest.raises(InputError, match="no method of units"):
        node_scores(of.engine, scored("zero"), Site.parse("z[*] @ last"), "lrp")
    with pytest.raises(InputError, match="no gradient here"):
        Objective("rank", TOKENS, (8,))
    with pytest.raises(InputError, match="cannot be interpolated"):
        node_scores(of.engine, scored("zero"), Site.parse("resid_mid @ last"), "atp_ig")
    donors = {slot: torch.zeros(1) for slot in sender_slots(of.runtime)}
    mamba = Runtime(tiny_model("mamba"), None)
    with pytest.raises(InputError, match="edges need"):
        edge_attribution(mamba, CLEAN, scored("zero").objective, donors)
    pattern = node_scores(of.engine, scored("zero"), Site.parse("pattern @ last"), "atp")
    assert pattern.shape == (LAYERS, 1, HEADS)
    assert np.abs(pattern).max() > 0
    assert of.module.config._attn_implementation == "sdpa"
