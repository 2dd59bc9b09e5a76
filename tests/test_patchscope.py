"""Patchscopes: what is put where, exact self-patches, placeholders, matching, controls, grids, stores."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, LAYERS, WIDTH, model, text

import nsp
from nsp.datasets.entities import ENTITIES, entities, read_entities
from nsp.engine.budget import Budget
from nsp.engine.generation import Decoding
from nsp.engine.vector_patching import VectorPatches, next_tokens_of
from nsp.errors import InputError
from nsp.experiments import patchscope
from nsp.experiments.patchscope.experiment import Patchscope
from nsp.experiments.patchscope.grid import Grid, hotspot_cells, neighbours, spaced
from nsp.experiments.patchscope.map import fit_map
from nsp.experiments.patchscope.match import (
    FAILED,
    PARTIAL,
    STRONG,
    Expected,
    answer_part,
    match_class,
    normalised,
    says,
)
from nsp.experiments.patchscope.recipe import PatchscopeRecipe
from nsp.experiments.patchscope.summary import (
    consistency,
    headline,
    hotspots,
    success,
    success_rates,
    summarise,
)
from nsp.experiments.patchscope.templates import TEMPLATES, Template, target_prompt
from nsp.experiments.runner import run
from nsp.statistics.proportion import wilson_interval

STEPS = 5
# The words of the tiny tokenizer: one token each; w3 is the placeholder of its template.
TEMPLATE = {"name": "tiny", "prompt": text([7, 8, 9, 3, 10]), "expects": "name", "answer": " w12 w13"}


@pytest.fixture(scope="module")
def llama() -> nsp.Model:
    return model("llama")


@pytest.fixture(scope="module")
def other() -> nsp.Model:
    """Another model of another width with the same tokens."""
    return model("llama", seed=1, hidden_size=24)


def options(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "sources": [
            {"prompt": text(CLEAN), "strong": ["w1*"]},
            {"prompt": text(CORRUPT), "strong": ["w2*"], "entity": "b"},
        ],
        "templates": [TEMPLATE],
        "placeholder": "w3",
        "generation": {"max_new_tokens": STEPS, "stop": False},
    }
    return made | changes


def hooked(
    of: nsp.Model, ids: list[int], layer: int, position: int, vector: torch.Tensor, steps: int = STEPS
) -> tuple[list[int], torch.Tensor]:
    """The greedy text, and the logits after the prompt, of transformers' own generate with a hook: the reference."""

    def put(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] == 1:
            return output
        output = output.clone()
        output[0, position] = vector
        return output

    hook = of.module.model.layers[layer].register_forward_hook(put)
    try:
        given = torch.tensor([ids])
        made = of.module.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
        )
        logits = of.module(given).logits[0]
    finally:
        hook.remove()
    return made[0, len(ids) :].tolist(), logits.detach()


def resid_post(of: nsp.Model, ids: list[int], layer: int, position: int) -> torch.Tensor:
    found: list[torch.Tensor] = []
    hook = of.module.model.layers[layer].register_forward_hook(lambda _m, _a, output: found.append(output.detach()))
    of.module(torch.tensor([ids]))
    hook.remove()
    return found[0][0, position]


# --- the engine's part ----------------------------------------------------------------------------------------------


def test_cells_are_hooked_generation_with_the_vector_put_in(llama: nsp.Model) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, WIDTH, generator=generator) * 2
    prompts = [CLEAN, CORRUPT[:6]]
    places = (3, 5)
    target, layer = np.array([0, 1, 0, 1, 0]), np.array([0, 2, 1, 0, -1])
    patches = VectorPatches(tuple(map(llama.encode, prompts)), places, vectors, target, layer, np.array([0, 1, 2, 3, 0]))
    budget = Budget.of(None, llama.loaded.device)
    branches = patches.branches(llama.runtime)
    made = llama.engine.generate(branches, Decoding(STEPS, stop=False)).by_branch
    wanted = np.array([[5, 11], [9, -1], [3, 4], [0, 1], [2, 6]])
    first = next_tokens_of(llama.runtime, branches, wanted, 3, budget)
    for cell in range(4):
        ids, place = prompts[target[cell]], places[target[cell]]
        expected, logits = hooked(llama, ids, int(layer[cell]), place, vectors[cell])
        assert made[cell].tolist() == expected
        log_p = torch.log_softmax(logits[-1].double(), dim=0)
        assert first.entropy[cell] == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=1e-4)
        assert first.top[cell].tolist() == log_p.topk(3).indices.tolist()
        assert first.logprob[cell, 0] == pytest.approx(float(log_p[wanted[cell, 0]]), abs=1e-4)
        assert first.rank[cell, 0] == int((log_p > log_p[wanted[cell, 0]]).sum())
    assert np.isnan(first.logprob[1, 1])
    assert first.rank[1, 1] == -1
    with llama.trace(CLEAN) as t:
        t.generate(STEPS, stop=False)
    assert made[4].tolist() == t.results["token_id"].values.tolist()


def test_an_answers_score_is_its_log_probability_under_the_patch(llama: nsp.Model) -> None:
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3)) * 2
    answers = [(12, 13, 14), (20,)]
    patches = VectorPatches(
        (llama.encode(CLEAN), llama.encode(CORRUPT[:6])),
        (3, 5),
        vectors,
        np.array([0, 1]),
        np.array([1, 0]),
        np.array([0, 1]),
    )
    scores = llama.engine.measure(patches.answered(llama.runtime, answers)).by_branch[0]
    for cell, (ids, place, layer) in enumerate([(CLEAN, 3, 1), (CORRUPT[:6], 5, 0)]):
        _, logits = hooked(llama, [*ids, *answers[cell]], layer, place, vectors[cell])
        log_p = torch.log_softmax(logits.double(), dim=1)
        expected = sum(float(log_p[len(ids) - 1 + step, token]) for step, token in enumerate(answers[cell]))
        assert scores[cell] == pytest.approx(expected, abs=1e-4)


# --- the experiment -------------------------------------------------------------------------------------------------


def test_a_grid_is_hooked_generation_cell_by_cell(llama: nsp.Model) -> None:
    tree = patchscope(llama, **options())
    ids, place = [7, 8, 9, 3, 10], 3
    for row, source in enumerate((CLEAN, CORRUPT)):
        for layer in range(LAYERS):
            vector = resid_post(llama, source, layer, len(source) - 1)
            for target in range(LAYERS):
                at = {"prompt": row, "layer": layer, "target_layer": target}
                expected, logits = hooked(llama, ids, target, place, vector)
                assert tree["generations"]["token_id"].sel(at).values.tolist() == expected
                assert str(tree["generations"]["text"].sel(at).values) == llama.tokenizer.decode(
                    expected, skip_special_tokens=True
                )
                log_p = torch.log_softmax(logits[-1].double(), dim=0)
                assert float(tree["effects/patch"]["first_logprob"].sel(at)) == pytest.approx(
                    float(log_p[12]), abs=1e-4
                )
                assert float(tree["receipts/patch"]["vector_norm"].sel(at)) == pytest.approx(
                    float(vector.norm()), rel=1e-4
                )
                there = resid_post(llama, ids, target, place)
                assert float(tree["receipts/patch"]["change_norm"].sel(at)) == pytest.approx(
                    float((vector - there).norm()), rel=1e-4
                )


def test_a_patch_onto_itself_is_the_run_without_a_patch(llama: nsp.Model) -> None:
    """Source and target are one prompt and one position: every l -> l cell is the baseline, exactly."""
    prompt = text(CLEAN)
    tree = patchscope(llama, **options(sources=[{"prompt": prompt, "position": 7, "strong": ["w1*"]}], placeholder="w58",
                                       templates=[{"name": "same", "prompt": prompt, "answer": " w12"}]))  # fmt: skip
    baseline = tree["baseline"].to_dataset().isel(prompt=0)
    for layer in range(LAYERS):
        at = {"prompt": 0, "layer": layer, "target_layer": layer}
        assert tree["generations"]["token_id"].sel(at).values.tolist() == baseline["token_id"].values.tolist()
        assert float(tree["receipts/patch"]["change_norm"].sel(at)) == 0.0
        assert float(tree["effects/patch"]["score"].sel(at)) == pytest.approx(float(baseline["score"]), abs=1e-5)
    off = {"prompt": 0, "layer": 0, "target_layer": 1}
    assert float(tree["receipts/patch"]["change_norm"].sel(off)) > 0
    assert abs(float(tree["effects/patch"]["score"].sel(off)) - float(baseline["score"])) > 1e-3


def test_the_random_control_has_the_norm_and_another_direction(llama: nsp.Model) -> None:
    made = PatchscopeRecipe.model_validate({"kind": "patchscope", **options()})
    job = Patchscope(llama, made)
    places = np.array([(0, 1, 2), (1, 0, 0)])
    patch, random, unrelated = (job.readings.vectors(name, places) for name in ("patch", "random", "unrelated"))
    assert torch.allclose(patch.norm(dim=1), random.norm(dim=1), rtol=1e-5)
    assert float(torch.nn.functional.cosine_similarity(patch, random).abs().max()) < 0.7
    assert torch.equal(unrelated[0], resid_post(llama, CORRUPT, 1, len(CORRUPT) - 1))
    again = Patchscope(llama, made).readings.vectors("random", places)
    assert torch.equal(random, again)


def test_templates_are_rows_and_sampling_is_seeded(llama: nsp.Model) -> None:
    sampled = {"max_new_tokens": STEPS, "stop": False, "temperature": 1.0, "seed": 4}
    second = {**TEMPLATE, "name": "second", "prompt": text([3, 40])}
    tree = patchscope(llama, **options(templates=[TEMPLATE, second], generation=sampled, layers="0:2", target_layers=1))
    effects = tree["effects/patch"].to_dataset()
    assert effects["template"].values.tolist() == ["tiny", "second"] * 2
    assert effects["match"].dims == ("prompt", "layer", "target_layer")
    assert effects["layer"].values.tolist() == [0, 1]
    assert effects["target_layer"].values.tolist() == [1]
    again = patchscope(
        llama, **options(templates=[TEMPLATE, second], generation=sampled, layers="0:2", target_layers=1)
    )
    assert (again["generations"]["text"].values == tree["generations"]["text"].values).all()


def test_positions_name_an_index_or_a_spans_last_token(llama: nsp.Model) -> None:
    given = [
        {"prompt": text(CLEAN), "position": 2, "strong": ["x"]},
        {"prompt": text(CLEAN), "position": "part", "spans": {"part": text(CLEAN[3:6])}, "strong": ["x"]},
        {"prompt": text(CLEAN), "position": -2, "strong": ["x"]},
    ]
    recipe = PatchscopeRecipe.model_validate({"kind": "patchscope", **options(sources=given)})
    job = Patchscope(llama, recipe)
    assert [source.position for source in job.sources[:3]] == [2, 5, len(CLEAN) - 2]
    with pytest.raises(InputError, match="50"):
        Patchscope(
            llama,
            PatchscopeRecipe.model_validate(
                {"kind": "patchscope", **options(sources=[{"prompt": text(CLEAN), "position": 50}])}
            ),
        )


def test_a_run_goes_on_after_a_kill(llama: nsp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("nsp.experiments.patchscope.experiment")

    monkeypatch.setattr(module, "_UNIT_CELLS", 9)
    recipe = PatchscopeRecipe.model_validate({"kind": "patchscope", **options()})
    job = Patchscope(llama, recipe)
    assert len(job.units) == 6
    whole = run(job, out=tmp_path / "whole.zarr", progress=False).tree
    done: list[int] = []

    compute = Patchscope.compute

    def killing(self: Patchscope, unit: Any, *arguments: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(unit.index)
        return compute(self, unit, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Patchscope, "compute", killing)
        with pytest.raises(KeyboardInterrupt):
            run(Patchscope(llama, recipe), out=tmp_path / "part.zarr", progress=False)
    assert len(nsp.open_run(tmp_path / "part.zarr").pending) == 3
    resumed = run(Patchscope(llama, recipe), out=tmp_path / "part.zarr", progress=False).tree
    for group in ("effects/patch", "effects/random", "generations", "baseline", "receipts/patch"):
        xr.testing.assert_equal(resumed[group].to_dataset().load(), whole[group].to_dataset().load())
    opened = xr.open_datatree(tmp_path / "part.zarr", engine="zarr", consolidated=False)
    assert opened["generations"]["text"].values.tolist() == whole["generations"]["text"].values.tolist()
    listed = nsp.open_run(tmp_path / "part.zarr").header["extra"]
    assert listed["headline"] == headline(whole)
    assert listed["bytes"] > 1000


def test_comprehensive_refines_around_hotspots_and_compares_templates() -> None:
    deep = model("llama", num_hidden_layers=9)
    second = {**TEMPLATE, "name": "second", "prompt": text([3, 40])}
    tree = patchscope(deep, **options(templates=[TEMPLATE, second], preset="comprehensive", controls=["random"]))
    phase = tree["effects/patch"]["phase"]
    assert phase.sizes == {"prompt": 4, "layer": 9, "target_layer": 9}
    first, other = phase.sel(prompt=0).values, phase.sel(prompt=1).values
    assert (first[::2, ::2] == 0).all()
    assert (first == 1).sum() > 0
    assert ((first >= 0) == (other == 2)).all()
    ran = phase.values >= 0
    assert np.isfinite(tree["effects/patch"]["score"].values[ran]).all()
    assert np.isnan(tree["effects/patch"]["score"].values[~ran]).all()
    assert (tree["effects/random"]["match"].values[~ran] == -1).all()
    # Cells that ran are those of the plain grid.
    plain = patchscope(deep, **options(templates=[TEMPLATE, second], controls=["random"]))
    assert (plain["generations"]["token_id"].values[ran] == tree["generations"]["token_id"].values[ran]).all()


def test_presets_scale_with_depth() -> None:
    assert spaced(30, 6) == (0, 6, 12, 17, 23, 29)
    assert spaced(3, 6) == (0, 1, 2)
    grid = Grid(tuple(range(9)), tuple(range(9)), coarse=4)
    assert len(grid.coarse_cells()) == 9
    match = np.zeros((9, 9))
    match[4, 8] = 2
    assert hotspot_cells(grid.coarse_cells(), match, np.full((9, 9), np.nan))[0] == (4, 8)
    assert neighbours([(0, 8)], grid) == [(x, y) for x in (0, 1, 2) for y in (6, 7, 8)]


# --- another model --------------------------------------------------------------------------------------------------


def test_models_of_other_width_need_a_map(llama: nsp.Model, other: nsp.Model) -> None:
    with pytest.raises(InputError, match=r"width 24.*one of 32.*map"):
        patchscope(llama, **options(), source_model=other)
    texts = [text([int(token) for token in np.random.default_rng(row).integers(0, 50, 12)]) for row in range(40)]
    tree = patchscope(llama, **options(map={"prompts": texts}, layers=[0, 1], target_layers=[0, 2]), source_model=other)
    assert tree["receipts/map"]["r2"].shape == (2, 2)
    # Two random models share nothing that a map could carry; that it carries what there is, the next tests say.
    assert (tree["receipts/map"]["r2"].values < 1).all()
    assert np.isfinite(tree["receipts/patch"]["change_norm"].values).all()


def test_the_map_is_ridge_regression(llama: nsp.Model, other: nsp.Model) -> None:
    """Against the normal equations written out, with an intercept."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 50, 9).tolist() for _ in range(30)]
    found = fit_map(other.engine, llama.engine, texts, texts, [1], [0, 2], 0.05)
    assert len(found.source[0]) == 24 * 8
    x, y = found.source[0].double(), found.target[1].double()
    centred = x - x.mean(0)
    gram = centred.T @ centred
    weight = torch.linalg.inv(gram + 0.05 * gram.diagonal().mean() * torch.eye(24)) @ centred.T @ (y - y.mean(0))
    vector = torch.randn(1, 24)
    expected = y.mean(0) + (vector.double() - x.mean(0)) @ weight
    assert torch.allclose(found.mapped(vector, 0)[:, 1].double(), expected, atol=1e-4)


def test_a_map_of_a_model_onto_itself_is_nearly_the_identity(llama: nsp.Model) -> None:
    generator = np.random.default_rng(1)
    texts = [generator.integers(0, 50, 12).tolist() for _ in range(60)]
    found = fit_map(llama.engine, llama.engine, texts, texts, [0, 1], [0, 1], 1e-6)
    r2 = found.r2()
    assert r2[0, 0] > 0.999
    assert r2[1, 1] > 0.999
    assert r2[0, 1] < r2[1, 1]


# --- templates, placeholders, matching ------------------------------------------------------------------------------


def test_every_template_has_one_placeholder_token(tokenizer: Any) -> None:
    for name, template in TEMPLATES.items():
        prompt, position = target_prompt(tokenizer, template)
        assert prompt.token_texts[position].strip() == "?", name


def test_the_identity_prompt_is_the_papers() -> None:
    assert TEMPLATES["few_shot"].prompt == "cat -> cat\n1135 -> 1135\nhello -> hello\n?"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("no place", "0 times"), ("? and ?", "2 times"), ("what??", "2 times"), ("the man(?)", r"merges|tokens")],
)
def test_a_wrong_placeholder_shows_the_tokens(tokenizer: Any, prompt: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        target_prompt(tokenizer, Template("own", prompt))
    assert "Its tokens: '" in str(caught.value)


def test_matching_is_by_whole_words_without_case_accents_and_punctuation() -> None:
    assert normalised("  São-Paulo's\nCAFÉ! ") == "sao paulo s cafe"
    assert says("He is the U.S. President", "u s president")
    assert says("He lives in PARIS, France.", "paris")
    assert not says("comparison", "paris")
    assert says("theoretical physicists", "physic*")
    assert not says("physics", "physic")
    assert not says("anything", "?!")
    expected = Expected(("capital of France",), ("France", "city"))
    assert match_class("the capital of france", expected) == STRONG
    assert match_class("a city", expected) == PARTIAL
    assert match_class("simplicity", expected) == FAILED
    assert answer_part("\n -> Paris\nmango -> mango", "\n") == "-> Paris"


def test_built_in_entities_and_files(tmp_path: Path) -> None:
    assert {entity.kind for entity in ENTITIES.values()} == {"people", "places", "things"}
    assert all(entity.strong and entity.partial and entity.answer for entity in ENTITIES.values())
    assert [entity.name for entity in entities(["Paris", "piano"])] == ["Paris", "piano"]
    with pytest.raises(InputError, match="no built-in entity"):
        entities("Atlantis")
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"Oslo": {"strong": ["Norway"], "answers": {"country": "Norway"}}}))
    assert read_entities(path)["Oslo"].answers == (("country", "Norway"),)
    for wrong, said in (
        ({"Oslo": {"strong": "Norway"}}, "list"),
        ({"Oslo": {}}, "nothing could match"),
        ({"Oslo": {"storng": []}}, "object"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=said):
            read_entities(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "quick", "layers": "0:2"}, "preset quick"),
        ({"templates": ["describe", "describe"]}, "two templates"),
        ({"templates": "descrybe"}, "built in are"),
        ({"sources": {"entities": "all", "prompt": "about it"}}, "entity"),
        ({"controls": ["noise"]}, "random"),
        ({"templates": [{"prompt": "a ?", "answer": "{nme}"}]}, "token"),
    ],
)
def test_wrong_recipes_say_what_would_work(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PatchscopeRecipe.model_validate({"kind": "patchscope", "sources": "people", **changes})


def test_an_unknown_entity_without_facts_is_an_error(tokenizer: Any) -> None:
    from nsp.experiments.patchscope.sources import make_sources

    recipe = PatchscopeRecipe.model_validate(
        {"kind": "patchscope", "sources": [{"prompt": "I saw Zog", "entity": "Zog"}]}
    )
    with pytest.raises(InputError, match="nothing is known"):
        make_sources(tokenizer, recipe)


# --- results --------------------------------------------------------------------------------------------------------


def synthetic() -> xr.DataTree:
    """Two sources, two templates, 2 x 2 layers."""
    match = np.array([[[2, 0], [1, 0]], [[2, 0], [0, 0]], [[1, 0], [0, -1]], [[0, 0], [0, -1]]], dtype=np.int8)
    coords = {
        "prompt": np.arange(4), "layer": [0, 3], "target_layer": [1, 2],
        "source": ("prompt", ["a", "a", "b", "b"]), "template": ("prompt", ["x", "y", "x", "y"]),
    }  # fmt: skip
    dims = ("prompt", "layer", "target_layer")

    def effects(values: np.ndarray, score: float) -> xr.Dataset:
        scores = np.full(values.shape, score, dtype=np.float32)
        scores[0, 0, 0] += 1
        return xr.Dataset(
            {"match": (dims, values), "score": (dims, scores), "phase": (dims, np.where(values >= 0, 0, -1))}, coords
        )

    random = np.where(match >= 0, 0, -1).astype(np.int8)
    random[2, 0, 0] = 1
    baseline = xr.Dataset({"match": ("prompt", np.array([0, 0, 0, 0])), "score": ("prompt", np.full(4, -9.0))},
                          {name: coords[name] for name in ("prompt", "source", "template")})  # fmt: skip
    texts = xr.Dataset({"text": (dims, np.full(match.shape, "a\ntext", dtype=object))}, coords)
    tree = {"effects/patch": effects(match, -2), "effects/random": effects(random, -5), "baseline": baseline, "generations": texts,
            "inputs": baseline[["match"]]}  # fmt: skip
    return xr.DataTree.from_dict(tree)


def test_success_rates_average_templates_within_a_source() -> None:
    tree = synthetic()
    rates = success_rates(tree)
    assert float(rates["rate"].sel(layer=0, target_layer=1)) == pytest.approx((1 + 0.5) / 2)
    assert float(rates["random"].sel(layer=0, target_layer=1)) == pytest.approx(0.25)
    assert float(rates["lift"].sel(layer=0, target_layer=1)) == pytest.approx(0.5)
    assert int(rates["n"].sel(layer=3, target_layer=2)) == 1
    assert float(success_rates(tree, "strong")["rate"].sel(layer=0, target_layer=1)) == pytest.approx(0.5)
    assert float(success_rates(tree, template="y")["rate"].sel(layer=0, target_layer=1)) == pytest.approx(0.5)
    assert np.isnan(success(tree).sel(prompt=2, layer=3, target_layer=2))
    with pytest.raises(InputError, match="it has patch, random"):
        success(tree, variant="unrelated")


def test_wilson_is_the_published_interval() -> None:
    low, high = wilson_interval(np.array([0.8, 0.0]), np.array([10, 5]), 0.95)
    assert low[0] == pytest.approx(0.4902, abs=1e-4)
    assert high[0] == pytest.approx(0.9433, abs=1e-4)
    assert (low[1], high[1]) == (0.0, pytest.approx(0.4345, abs=1e-4))


def test_consistency_and_hotspots() -> None:
    tree = synthetic()
    agreement = consistency(tree)
    # At (0, 1) the templates agree on a and split on b; at (3, 1) they split on a and agree on b.
    assert float(agreement.sel(layer=0, target_layer=1)) == pytest.approx(0.75)
    assert float(agreement.sel(layer=0, target_layer=2)) == pytest.approx(1.0)
    best = hotspots(tree)[0]
    assert (best["layer"], best["target_layer"]) == (0, 1)
    assert best["score_lead"] == pytest.approx(3.0)
    assert "0 -> 1" in headline(tree)
    said = str(summarise(tree))
    assert "random" in said
    assert "|█ |" in said or "|▓ |" in said
