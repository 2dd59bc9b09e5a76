"""Causal tracing: every restored state against raw hooks, the engine's own sweeps, and the facts that ship with nsp."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_architectures
import torch
import xarray as xr
from engine_models import LAYERS, Both, both, one_thread  # noqa: F401
from engine_models import tokenizer as word_tokenizer
from hooks_reference import Edit, HookedReference, at, replacing
from tiny_architectures import quiet_and_alone  # noqa: F401

import nsp
from nsp.datasets.facts import FACTS, ROLES, encode_fact, read_facts, roles
from nsp.errors import InputError
from nsp.experiments import EXPERIMENTS, causal_tracing, run
from nsp.experiments.causal_tracing.summary import by_role, summarise, total_effect
from nsp.recipe import find_recipe, load_recipe_file

KIND = "causal-tracing"
FACT_LIST = [
    {"prompt": "w5 w11 w23 w7 w40 w31 w3", "subject": "w23 w7", "answer": "w4"},
    {"prompt": "w1 w2 w3 w9 w8", "subject": "w1 w2 w3", "answer": "w7"},
]
SCALE = 1.5
OPTIONS: dict[str, Any] = {"known_only": False, "noise": {"scale": SCALE, "draws": 2}, "window": 2}


@pytest.fixture(params=["llama", "gpt2"])
def model_of(request: pytest.FixtureRequest) -> Both:
    return both(request.param)


def ids_of(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


def noise_of(seed: int, position: int, width: int, deviation: float) -> torch.Tensor:
    """The draw that `nsp.Noise` documents: one generator a position, seeded by seed, site and position."""
    import hashlib

    name = f"{seed}:boundary:0:{position}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
    return torch.randn(width, generator=generator).double() * deviation


def subject_of(fact: dict[str, str]) -> list[int]:
    words, subject = fact["prompt"].split(), fact["subject"].split()
    first = words.index(subject[0])
    return list(range(first, first + len(subject)))


def corrupting(which: Both, fact: dict[str, str], seed: int, scale: float) -> Edit:
    """Noise on the subject's embeddings, made here by hand."""
    embedding = which.model.module.get_input_embeddings().weight
    deviation = scale * float(embedding.std())

    def change(value: torch.Tensor) -> torch.Tensor:
        for position in subject_of(fact):
            value[position, 0] += noise_of(seed, position, value.shape[-1], deviation)
        return value

    return Edit("embed", 0, change)


def test_every_state_against_hooks(model_of: Both) -> None:
    tree = causal_tracing(model_of.model, FACT_LIST, **OPTIONS)
    seeds = tree["inputs"].attrs["noise_seeds"]
    assert np.unique(np.asarray(seeds)).size == 4
    for number, fact in enumerate(FACT_LIST):
        ids, answer = ids_of(fact["prompt"]), int(fact["answer"][1:])

        def probability(*edits: Edit, ids: list[int] = ids, answer: int = answer) -> float:
            return float(model_of.reference.logits(ids, edits)[-1].softmax(-1)[answer])

        clean = probability()
        noisy = [corrupting(model_of, fact, seed, SCALE) for seed in seeds[number]]
        corrupted = np.mean([probability(edit) for edit in noisy])
        baseline = tree["baseline"].isel(prompt=number)
        np.testing.assert_allclose(baseline["prob_clean"], clean, rtol=1e-4)
        np.testing.assert_allclose(baseline["prob_corrupted"], corrupted, rtol=1e-4)
        sites = [(name, layer) for name in ("resid_post", "attn_out", "mlp_out") for layer in range(LAYERS)]
        donors = model_of.reference.values(ids, sites)
        for name in ("resid_post", "attn_out", "mlp_out"):
            found = tree[f"effects/{name}"].to_dataset().isel(prompt=number)
            for layer in range(LAYERS):
                # A window of two layers around l is l - 1 and l, as in the paper's code, clipped at 0.
                window = [layer] if name == "resid_post" else [one for one in (layer - 1, layer) if one >= 0]
                for position in range(len(ids)):
                    edits = [Edit(name, one, replacing(donors[name, one], [position], None)) for one in window]
                    restored = np.mean([probability(edit, *edits) for edit in noisy])
                    cell = found.sel(layer=layer, position=position)
                    np.testing.assert_allclose(cell["prob"], restored, rtol=1e-3, atol=1e-6)
                    np.testing.assert_allclose(cell["indirect_effect"], restored - corrupted, rtol=0, atol=2e-6)
                    share = (restored - corrupted) / (clean - corrupted)
                    np.testing.assert_allclose(cell["effect"], share, rtol=0, atol=2e-3)
            assert np.isnan(found["prob"].isel(position=slice(len(ids), None))).all()


def test_it_is_what_a_trace_with_noise_and_a_sweep_gives() -> None:
    """The engine's own fixed and swept interventions, which start from the clean run, agree with the corrupted trunk."""
    which = both("llama")
    tree = causal_tracing(which.model, FACT_LIST[:1], components=["resid_post", "mlp_out"], **{**OPTIONS, "window": 1})
    fact = FACT_LIST[0]
    prompt = which.model.encode(fact["prompt"], spans={"subject": fact["subject"]})
    values: dict[str, list[xr.DataArray]] = {"resid_post": [], "mlp_out": []}
    for seed in tree["inputs"].attrs["noise_seeds"][0]:
        for name, found in values.items():
            with which.model.trace(prompt) as t:
                t.inject("embed @ subject", nsp.Noise(SCALE, int(seed)))
                t.sweep(nsp.patch(f"{name}[*] @ *", donor=prompt))
                t.measure(nsp.logprob(fact["answer"]))
            found.append(t.results["logprob"])
    for name, found in values.items():
        mean = np.mean([one.values for one in found], axis=0)
        np.testing.assert_allclose(tree[f"effects/{name}"]["logprob"][0], mean, rtol=0, atol=2e-5)


def test_what_the_noise_never_reaches_does_not_run_and_the_end_is_restored() -> None:
    tree = causal_tracing(both("llama").model, FACT_LIST, **OPTIONS)
    effects, receipts = tree["effects/resid_post"].to_dataset(), tree["receipts/resid_post"].to_dataset()
    assert (receipts["fired"].isel(prompt=0, position=slice(0, 2)) == 0).all()
    assert (effects["indirect_effect"].isel(prompt=0, position=slice(0, 2)) == 0).all()
    np.testing.assert_allclose(effects["effect"].isel(prompt=0, layer=-1, position=6), 1, atol=1e-4)
    # Both draws write once a state, and twice a window that is not at the edge.
    assert receipts["fired"].isel(prompt=0, layer=0, position=3) == 2
    assert tree["receipts/mlp_out"]["fired"].isel(prompt=0, layer=1, position=3) == 4
    assert (receipts["change_norm"].isel(prompt=0, layer=0, position=slice(2, 7)) > 0).all()


@pytest.mark.parametrize("case", ["bloom", "gptj", "gemma2", "olmo2", "mamba"])
@pytest.mark.usefixtures("quiet_and_alone")
def test_other_architectures_and_the_plain_path(case: str) -> None:
    """The corrupted trunk and full passes that carry the noise along are the same experiment."""
    of = nsp.load(tiny_architectures.tiny_model(case), tokenizer=word_tokenizer())
    components = ["resid_post"] if case == "mamba" else ["resid_post", "attn_out", "mlp_out"]
    tree = causal_tracing(of, FACT_LIST, components=components, **OPTIONS)
    first = f"receipts/{components[0]}"
    assert tree[first].attrs["path"] == ("plain" if case in ("bloom", "mamba") else "branch")
    if tree[first].attrs["path"] == "branch":
        of.runtime.branch_refusal = "for the test"
        plain = causal_tracing(of, FACT_LIST, components=components, **OPTIONS)
        assert plain[first].attrs["path"] == "plain"
        for name in components:
            np.testing.assert_allclose(tree[f"effects/{name}"]["logprob"], plain[f"effects/{name}"]["logprob"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(tree["effects/resid_post"]["effect"].isel(prompt=1, layer=-1, position=4), 1, atol=1e-3)


def test_noise_in_units_of_the_subjects_own_embeddings() -> None:
    of = both("llama").model
    recipe = EXPERIMENTS[KIND].recipe_class.model_validate(
        {"kind": KIND, "facts": FACT_LIST, "known_only": False, "noise": {"scale": 2, "of": "subjects", "draws": 1}}
    )
    job = EXPERIMENTS[KIND](of, recipe)
    weight = of.module.get_input_embeddings().weight
    rows = torch.cat([weight[[ids_of(f["prompt"])[p] for p in subject_of(f)]] for f in FACT_LIST])
    expected = 2 * float(rows.std()) / float(weight.std())
    np.testing.assert_allclose(job.plan.statement["noise"]["scale"], expected, rtol=1e-5)


def test_roles_and_their_means() -> None:
    tree = causal_tracing(both("llama").model, FACT_LIST, **OPTIONS)
    role = tree["inputs"]["role"].values
    assert role[0].tolist() == ["", "", "subject_first", "subject_last", "after_first", "after_rest", "last"]
    assert role[1].tolist() == ["subject_first", "subject_middle", "subject_last", "after_first", "last", "", ""]
    found = by_role(tree, "mlp_out")
    assert found["mean"].dims == ("position", "layer")
    assert found["position"].values.tolist() == list(ROLES)
    effect = tree["effects/mlp_out"]["indirect_effect"].values
    np.testing.assert_allclose(found["mean"].sel(position="last", layer=1), (effect[0, 1, 6] + effect[1, 1, 4]) / 2, rtol=1e-5)
    np.testing.assert_allclose(found["mean"].sel(position="subject_middle"), effect[1, :, 1], rtol=1e-5)
    assert (found["n"].sel(position="after_rest") == 1).all()
    one = causal_tracing(both("llama").model, FACT_LIST[:1], **OPTIONS)
    assert np.isnan(by_role(one, "mlp_out")["low"]).all()
    assert "no intervals" in str(summarise(one))


def test_units_of_work_and_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = both("llama").model
    whole = causal_tracing(of, FACT_LIST, **OPTIONS)
    monkeypatch.setattr(import_module("nsp.experiments.causal_tracing.experiment"), "_UNIT_FLOP", 1.0)
    recipe = EXPERIMENTS[KIND].recipe_class.model_validate(
        {"kind": KIND, "model": "tiny", "facts": FACT_LIST, **OPTIONS}
    )
    job = EXPERIMENTS[KIND](of, recipe)
    assert len(job.units) == 2
    run(job, out=tmp_path / "x.zarr", progress=False)
    tree = xr.open_datatree(tmp_path / "x.zarr", engine="zarr", consolidated=False)
    for name in ("prob", "indirect_effect", "indirect_effect_sd", "effect", "logprob", "indirect_effect_logprob"):
        np.testing.assert_allclose(tree["effects/attn_out"][name], whole["effects/attn_out"][name], rtol=0, atol=1e-4)
    mean, low, high = total_effect(tree, "prob")
    assert low <= mean <= high
    assert "last subject token" in str(summarise(tree))
    again = EXPERIMENTS[KIND].recipe_class.model_validate(tree.attrs["recipe_resolved"])
    assert EXPERIMENTS[KIND](of, again).plan.hash == tree.attrs["plan_hash"]
    other = EXPERIMENTS[KIND].recipe_class.model_validate({**tree.attrs["recipe_resolved"], "seed": 1})
    assert EXPERIMENTS[KIND](of, other).plan.hash != tree.attrs["plan_hash"]


def test_facts_that_the_model_does_not_know_are_left_out() -> None:
    which = both("llama")
    top = int(which.reference.logits(ids_of(FACT_LIST[0]["prompt"]))[-1].argmax())
    known = {**FACT_LIST[0], "answer": f"w{top}"}
    tree = causal_tracing(which.model, [FACT_LIST[1], known], **{**OPTIONS, "known_only": True})
    assert tree["inputs"].sizes["prompt"] == 1
    assert tree["inputs"].attrs["left_out"] == [FACT_LIST[1]["prompt"]]
    assert "does not know" in str(summarise(tree))
    with pytest.raises(InputError, match="knows none of the 1 facts"):
        causal_tracing(which.model, [FACT_LIST[1]])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric": "logit_diff"}, "distractor"),
        ({"metric": ["prob", "prob"]}, "two metrics"),
        ({"components": ["z"]}, "resid_post"),
        ({"window": 0}, "window"),
        ({"noise": 0}, "noise"),
        ({"facts": []}, "facts"),
    ],
    ids=str,
)
def test_a_recipe_that_makes_no_sense_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EXPERIMENTS[KIND].recipe_class.model_validate({"kind": KIND, **keys})


def test_facts_from_a_file_and_their_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("prompt,subject,answer\nw1 w2 w3,w2,w9\nw1 w1 w3,w1,w9\n")
    facts = read_facts(str(path))
    assert (facts[0].prompt, facts[0].subject, facts[0].answer) == ("w1 w2 w3", "w2", "w9")
    with pytest.raises(InputError, match=r"facts.csv:3: .*2 times"):
        encode_fact(both("llama").model.tokenizer, facts[1])
    path.write_text("prompt,subject\nw1 w2 w3,w2\n")
    with pytest.raises(InputError, match="answer"):
        read_facts(str(path))
    with pytest.raises(InputError, match="whole prompt"):
        causal_tracing(both("llama").model, [{"prompt": "w1 w2", "subject": "w1 w2", "answer": "w3"}], known_only=False)


# --- smollm2 ------------------------------------------------------------------------------------------------------------


def test_smollm2_knows_every_fact_that_ships(smollm2: nsp.Model) -> None:
    assert len(FACTS) >= 40
    assert len({fact.prompt for fact in FACTS}) == len(FACTS)
    encoded = [encode_fact(smollm2.tokenizer, fact) for fact in FACTS]
    for fact in encoded:
        assert roles(fact.prompt)[-1] == "last"
        assert "subject_last" in roles(fact.prompt)
        with torch.no_grad():
            logits = smollm2.module(torch.tensor([list(fact.prompt.token_ids)])).logits[0, -1]
        assert int(logits.argmax()) == fact.answer, fact.fact.prompt


def test_smollm2_against_hooks(smollm2: nsp.Model) -> None:
    """A sample of states of one fact on the real model; the restored last state gives the answer back."""
    fact = {"prompt": FACTS[0].prompt, "subject": FACTS[0].subject, "answer": FACTS[0].answer}
    tree = causal_tracing(smollm2, [fact], noise={"draws": 1}, components=["resid_post", "mlp_out"], window=6, layers=[0, 7, 15, 29])
    hooks = HookedReference(smollm2.module)
    prompt = smollm2.encode(fact["prompt"], spans={"subject": fact["subject"]})
    ids, subject = list(prompt.token_ids), prompt.span("subject")
    answer = smollm2.encode(fact["answer"]).token_ids[0]
    seed = tree["inputs"].attrs["noise_seeds"][0][0]
    deviation = 3 * float(smollm2.module.get_input_embeddings().weight.std())

    def change(value: torch.Tensor) -> torch.Tensor:
        def add(old: torch.Tensor, _where: Any) -> torch.Tensor:
            drawn = torch.stack([noise_of(seed, position, value.shape[-1], deviation) for position in subject])
            return old + drawn[:, None].to(old.dtype)

        return at(value, subject, None, add)

    noisy = Edit("embed", 0, change)
    donors = hooks.values(ids, [("resid_post", 7)] + [("mlp_out", layer) for layer in range(4, 10)])
    single = Edit("resid_post", 7, replacing(donors["resid_post", 7], [subject[-1]], None))
    window = [Edit("mlp_out", layer, replacing(donors["mlp_out", layer], [subject[-1]], None)) for layer in range(4, 10)]
    for name, edits in (("resid_post", [single]), ("mlp_out", window)):
        exact = hooks.logits(ids, [noisy, *edits])[-1].log_softmax(-1)[answer]
        found = tree[f"effects/{name}"]["logprob"].isel(prompt=0).sel(layer=7, position=subject[-1])
        np.testing.assert_allclose(found, float(exact), rtol=0, atol=2e-3)
    end = tree["effects/resid_post"].isel(prompt=0).sel(layer=29, position=len(ids) - 1)
    np.testing.assert_allclose(end["prob"], tree["baseline"]["prob_clean"][0], rtol=1e-4)


def test_the_shipped_recipe_is_valid() -> None:
    kinds = {name: experiment.recipe_class for name, experiment in EXPERIMENTS.items()}
    (resolved,) = load_recipe_file(find_recipe("causal-tracing"), kinds=kinds)
    assert resolved.recipe.kind == KIND
