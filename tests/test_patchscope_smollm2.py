"""Patchscopes and lenses on a real model: self-patches are exact, and the identity prompt names the source token."""

from __future__ import annotations

import torch

import nsp
from nsp.experiments import logit_attribution, patchscope
from nsp.experiments.patchscope.summary import success_rates

PROMPT = "The capital of Japan is the city of"


def test_a_patch_onto_itself_is_the_unpatched_text_at_every_layer(smollm2: nsp.Model) -> None:
    """Layer l of a prompt into layer l of the same prompt and position, 8 greedy tokens."""
    prompt = smollm2.encode(PROMPT)
    with smollm2.trace(PROMPT) as t:
        t.generate(8, stop=False)
    own = t.results["token_id"].values.tolist()
    layers = [0, 7, 15, 22, 29]
    for position in (4, len(prompt) - 1):
        site = f"resid_post[{','.join(map(str, layers))}] @ {position}"
        with smollm2.trace(PROMPT) as t:
            t.record(site)
        states = torch.tensor(t.results["resid_post"].values).reshape(len(layers), 1, -1)
        with smollm2.trace([PROMPT] * len(layers)) as t:  # one base prompt for each layer that is read
            t.sweep(nsp.inject(site, states, mode="set"), axes="layer")
            t.generate(8, stop=False)
        for place in range(len(layers)):
            assert t.results["token_id"].values[place, place].tolist() == own


def test_the_identity_prompt_names_the_source_token_above_the_random_control(smollm2: nsp.Model) -> None:
    tree = patchscope(
        smollm2,
        {"entities": ["Paris", "Brazil", "piano", "volcano"]},
        templates="few_shot",
        layers=[2, 6],
        target_layers=[1, 4],
        controls=["random"],
        generation={"max_new_tokens": 4},
    )
    rates = success_rates(tree, "strong")
    assert float(rates["rate"].mean()) >= 0.75
    assert float(rates["random"].mean()) == 0.0
    assert float(rates["none"].mean()) == 0.0
    patched, random = (tree[f"effects/{name}"]["score"] for name in ("patch", "random"))
    assert float((patched - random).min()) > 3  # nats, in every cell


def test_shares_of_smollm2_sum_to_its_logit_difference(smollm2: nsp.Model) -> None:
    prompt = "When Mary and John went to the store, John gave a drink to"
    tree = logit_attribution(smollm2, prompt, " Mary", " John", by=["component", "head"])
    baseline = tree["baseline"].to_dataset()
    assert abs(float(baseline["logit"][0]) - 6.1196) < 1e-3
    assert abs(float(baseline["total"][0]) - float(baseline["logit"][0])) < 1e-3
