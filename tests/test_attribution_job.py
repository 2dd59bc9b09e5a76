"""The kind ``attribution`` from recipe to store: stored scores, selection again, curves and knock-outs against hooks, targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, LAYERS, NEURONS, model, one_thread, reference, text  # noqa: F401
from hooks_reference import Edit, computing
from pydantic import ValidationError

import nsp
from nsp.errors import InputError
from nsp.experiments import EXPERIMENTS, attribution, discover, run
from nsp.experiments.attribution import experiment
from nsp.experiments.attribution.selection import ranking, select, universal_neurons
from nsp.experiments.attribution.summary import agreement, curves, summarise
from nsp.experiments.attribution.verification import random_like
from nsp.experiments.runner import run_in_memory
from nsp.recipe import load_recipe_file
from nsp.stores import open_run, schema, validate

PROMPTS = [
    {"prompt": text(CLEAN), "answer": "w4", "distractor": "w9", "donor": text(CORRUPT), "name": "first"},
    {"prompt": text(CORRUPT), "answer": "w7", "distractor": "w20", "donor": text(CLEAN)},
]
VERIFY = {"exact": "all", "top": 10, "ablations": ["zero"], "sizes": [0.1, 0.5, 1.0], "draws": 4, "curve_draws": 2}
KEYS = {
    "methods": ["atp", "relp"],
    "components": ["mlp_neurons", "z", "resid_post"],
    "select": {"top_k": 8},
    "verify": VERIFY,
}


def job_of(of: nsp.Model, **keys: Any) -> Any:
    kind = EXPERIMENTS["attribution"]
    return kind(of, kind.recipe_class.model_validate({"kind": "attribution", "model": "tiny", "prompts": PROMPTS, **KEYS, **keys}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_keeps_everything_and_is_resumed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model(family)
    out = tmp_path / "x.zarr"
    job = job_of(of)
    assert schema.check_tree(job.template()) == []
    run(job, out=out, progress=False)
    tree = open_run(str(out)).tree
    assert not validate(str(out)).problems
    found = tree["attribution/mlp_neurons"].to_dataset()
    assert found["relp"].dims == ("prompt", "layer", "position", "neuron")
    assert found["relp"].shape == (2, LAYERS, 1, NEURONS)
    assert tree["attribution/resid_post"]["atp"].dims == ("prompt", "layer", "position")
    for group in ("attribution", "effects", "circuit"):
        for node in tree[group].children.values():
            for name, variable in node.to_dataset().data_vars.items():
                assert np.isfinite(variable.values).all(), (group, node.name, name)
    assert "knock" not in str(summarise(tree)) or summarise(tree).tables
    monkeypatch.setattr(experiment, "node_scores", never)
    run(job_of(of), out=out, progress=False)  # nothing is left to compute
    again = select(tree, top_k=3, prompt=1, method="atp", component="z")
    assert len(again) == 3
    assert again.provenance["plan_hash"] == job.plan.hash
    assert len(select(tree, over="mean", per_layer=2, top_k=None)) == 2 * LAYERS
    assert set(universal_neurons(tree, top_k=5, share=1.0)) <= set(universal_neurons(tree, top_k=5, share=0.5))
    masks = tree["circuit/mlp_neurons"].to_dataset()["relp"].values
    mine = select(tree, top_k=8, prompt=0)
    assert masks[0].sum() == 8
    assert {(unit.layer, unit.unit) for unit in mine} == {(int(a), int(b)) for a, _, b in np.argwhere(masks[0])}
    with pytest.raises(InputError, match="prompts"):
        select(tree, top_k=3)
    with pytest.raises(InputError, match="no scores of eap_ig"):
        select(tree, method="eap_ig", prompt=0)
    with pytest.raises(InputError, match="not q"):
        select(tree, component="q", prompt=0)


def test_circuits_and_top_effects_read_the_scores_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, keys = model("llama"), {"verify": {**VERIFY, "exact": "top"}}
    whole = run_in_memory(job_of(of, **keys))
    compute = experiment.Attribution.compute

    def stopping(self: Any, unit: Any, *rest: Any) -> Any:
        if unit.stage:
            raise KeyboardInterrupt
        return compute(self, unit, *rest)

    monkeypatch.setattr(experiment.Attribution, "compute", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(job_of(of, **keys), out=tmp_path / "x.zarr", progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(experiment, "node_scores", never)
    resumed = run(job_of(of, **keys), out=tmp_path / "x.zarr", progress=False).tree
    for node in whole.subtree:
        for name, variable in node.to_dataset(inherit=False).data_vars.items():
            kept = resumed[node.path][name].values
            if variable.dtype.kind == "f":
                np.testing.assert_allclose(kept, variable.values, rtol=1e-5, atol=1e-6, err_msg=f"{node.path}/{name}")
            else:
                np.testing.assert_array_equal(kept, variable.values, err_msg=f"{node.path}/{name}")


def never(*_args: Any, **_keys: Any) -> Any:
    raise AssertionError("attributions were computed again")


def exact_metric(of: nsp.Model, prompt: dict[str, Any], gone: np.ndarray) -> float:
    """The metric with the neurons of ``gone`` (layer, neuron) at the last position set to zero, by raw hooks in float64."""
    ids = [int(word[1:]) for word in prompt["prompt"].split()]
    edits = []
    for layer in range(LAYERS):
        units = np.flatnonzero(gone[layer])
        if len(units):
            edits.append(Edit("mlp_neurons", layer, computing(torch.zeros_like, [len(ids) - 1], units.tolist())))
    logits = reference(of).logits(ids, edits)[-1]
    return float(logits[int(prompt["answer"][1:])] - logits[int(prompt["distractor"][1:])])


def test_proof_is_what_hooks_measure() -> None:
    of = model("llama")
    tree = attribution(of, PROMPTS, methods=("atp", "relp"), select={"top_k": 8}, verify=VERIFY)
    stored = tree["circuit/curves-zero"].to_dataset()
    for row, prompt in enumerate(PROMPTS):
        scores = tree["attribution/mlp_neurons"]["relp"].values[row, :, 0]
        order = ranking(np.abs(scores))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        for step, size in enumerate((14, 72, 144)):
            inside = (place < size).reshape(scores.shape)
            core = (place < size - max(1, size // 10)).reshape(scores.shape)
            for measure, kept in (("faithfulness", inside), ("completeness", ~inside), ("minimality", core)):
                expected = exact_metric(of, prompt, ~kept)
                assert stored[f"{measure}_relp"].values[row, step] == pytest.approx(expected, abs=2e-4)
        assert stored["empty"].values[row] == pytest.approx(exact_metric(of, prompt, np.ones_like(scores)), abs=2e-4)
        assert stored["whole"].values[row] == pytest.approx(exact_metric(of, prompt, np.zeros_like(scores)), abs=2e-4)
        circuit = tree["circuit/mlp_neurons"]["relp"].values[row, :, 0].astype(bool)
        knocked = tree["circuit/knockout"].to_dataset()
        assert knocked["circuit"].values[row] == pytest.approx(exact_metric(of, prompt, circuit), abs=2e-4)
        drawn = random_like(circuit[:, None], 4, row)[2, :, 0]
        assert knocked["random"].values[row, 2] == pytest.approx(exact_metric(of, prompt, drawn), abs=2e-4)
        for layer, unit in ((0, 3), (2, 40)):
            one = np.zeros_like(scores)
            one[layer, unit] = 1
            assert tree["effects/mlp_neurons"]["logit_diff"].values[row, layer, 0, unit] == pytest.approx(
                exact_metric(of, prompt, one), abs=2e-4
            )
    found = curves(tree, "zero")
    assert found["faithfulness"].sel(component="relp").values[-1] == pytest.approx(1.0)
    assert found["completeness"].sel(component="relp").values[-1] == pytest.approx(0.0, abs=1e-5)
    raw = {name: stored[name].values.astype(float).mean(axis=0) for name in ("faithfulness_atp", "empty", "whole")}
    np.testing.assert_allclose(
        found["faithfulness"].sel(component="atp").values,
        (raw["faithfulness_atp"] - raw["empty"]) / (raw["whole"] - raw["empty"]),
    )
    one = curves(tree, "zero", prompt=1)["faithfulness"].sel(component="atp").values[0]
    ends = [float(stored[name].values[1]) for name in ("empty", "whole")]
    assert one == pytest.approx(
        (float(stored["faithfulness_atp"].values[1, 0]) - ends[0]) / (ends[1] - ends[0]), rel=1e-4
    )
    assert agreement(tree)["spearman"].sel(component="atp").min() > 0.3
    with pytest.raises(InputError, match="no curves"):
        curves(tree, "mean")


def test_exact_top_patches_the_strongest_of_each_method() -> None:
    of = model("llama")
    tree = attribution(
        of, PROMPTS, methods=("atp", "relp"), verify={**VERIFY, "exact": "top", "top": 5, "ablations": []}
    )
    whole = attribution(of, PROMPTS, methods=("atp", "relp"), verify={**VERIFY, "ablations": []})
    some, every = (one["effects/mlp_neurons"]["change"].values for one in (tree, whole))
    known = ~np.isnan(some)
    assert 5 <= known[0].sum() <= 10
    np.testing.assert_allclose(some[known], every[known], atol=1e-5)
    assert np.isnan(agreement(tree)["recall"]).all()
    assert not any(name.startswith("curves") for name in tree["circuit"].children)


def test_the_runs_own_prompts_are_the_reference() -> None:
    of = model("llama")
    keys: dict[str, Any] = {
        "methods": ("atp",),
        "donor": "mean",
        "verify": {**VERIFY, "ablations": ["mean", "resample"]},
    }
    own = attribution(of, PROMPTS, reference="own", **keys)
    listed = attribution(of, PROMPTS, reference=[one["prompt"] for one in PROMPTS], reference_over="end", **keys)
    other = attribution(of, PROMPTS, reference=[one["prompt"] for one in PROMPTS], **keys)
    for group, name in (
        ("effects/mlp_neurons", "change"),
        ("circuit/curves-mean", "empty"),
        ("circuit/curves-resample", "empty"),
    ):
        assert np.array_equal(own[group][name].values, listed[group][name].values)
        assert not np.allclose(own[group][name].values, other[group][name].values)
    # Two prompts: a draw from the others is the other one's own value.
    swapped = attribution(
        of, PROMPTS, **{**keys, "donor": "counterfactual", "verify": {**VERIFY, "ablations": ["counterfactual"]}}
    )
    np.testing.assert_allclose(
        own["circuit/curves-resample"]["empty"].values,
        swapped["circuit/curves-counterfactual"]["empty"].values,
        rtol=1e-5,
    )
    assert agreement(own)["spearman"].min() > 0.3


def test_targets() -> None:
    of = model("llama")
    tree = attribution(of, [text(CLEAN), text(CORRUPT[:5])])
    inputs = tree["inputs"]
    for row, ids in enumerate((CLEAN, CORRUPT[:5])):
        order = reference(of).logits(ids)[-1].argsort(descending=True)
        assert [int(inputs[name].values[row]) for name in ("target_id", "counterfactual_id")] == order[:2].tolist()
        assert inputs["target_rank"].values[row] == 0
    alone = attribution(of, text(CLEAN), answer="w4", counterfactual=None, measure="logprob")
    expected = torch.log_softmax(reference(of).logits(CLEAN)[-1], dim=0)[4]
    assert alone["baseline"]["logprob"].values[0] == pytest.approx(float(expected), abs=1e-4)
    assert alone["inputs"]["counterfactual_id"].values[0] == -1
    by_id = attribution(of, CLEAN, answer=4, counterfactual=9)
    assert by_id["inputs"]["counterfactual_id"].values[0] == 9
    with pytest.raises(InputError, match="choose target: first, last or all"):
        attribution(of, text(CLEAN), answer="w4 w5")
    first = attribution(of, text(CLEAN), answer="w4 w5", target="first")
    assert (first["inputs"]["target_id"].values[0], first["inputs"].sizes["position"]) == (4, 9)
    last = attribution(of, text(CLEAN), answer="w4 w5", target="last")
    assert (last["inputs"]["target_id"].values[0], last["inputs"].sizes["position"]) == (5, 10)
    every = attribution(of, text(CLEAN), answer="w4 w5", counterfactual="w7 w8", target="all")
    assert every["inputs"]["target_id"].values.tolist() == [4, 5]
    assert every["inputs"]["name"].values.tolist() == ["prompt 0 [1/2]", "prompt 0 [2/2]"]
    with pytest.raises(InputError, match="equally many tokens"):
        attribution(of, text(CLEAN), answer="w4 w5", counterfactual="w7", target="all")
    with pytest.raises(InputError, match="the same"):
        attribution(of, text(CLEAN), answer="w4", counterfactual="w4")
    with pytest.raises(InputError, match="2 positions"):
        attribution(of, text(CLEAN), position="1,2")


def test_one_call_gives_the_circuit_of_a_prompt() -> None:
    of = model("gpt2")
    circuit = discover(of, text(CLEAN), target="w4", method="atp", top_k=6, positions="all")
    assert len(circuit) == 6
    assert (circuit.prompt, circuit.target.strip(), circuit.metric) == (text(CLEAN), "w4", "logit_diff")
    assert circuit.provenance["method"] == "atp"
    assert circuit.to_older()["total_logit_diff"] == pytest.approx(circuit.metric_value)
    assert discover(of, text(CLEAN), target="w4", component="z", method="atp", top_k=2).component == "z"
    assert all(unit.value > 0 for unit in discover(of, text(CLEAN), select={"sign": "positive", "top_k": 5}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"methods": ["edge"]}, "edge scores are not verified"),
        ({"donor": "counterfactual", "prompts": ["w1 w2"]}, "needs a counterfactual prompt"),
        (
            {"donor": "mean", "prompts": "fact-questions", "verify": {"ablations": ["counterfactual"]}},
            "has no counterfactual prompts",
        ),
        ({"select": {"method": "eap_ig"}}, "not among the methods"),
        ({"verify": {"sizes": [0.5, 0.1]}}, "ascending"),
        ({"measure": "prob"}, "counterfactual: none"),
        ({"components": ["mlp_neuron"]}, "did you mean"),
        ({"prompts": {"set": "fact"}}, "there is no set"),
    ],
)
def test_a_wrong_recipe_is_one_clear_error(keys: dict[str, Any], message: str) -> None:
    recipe = EXPERIMENTS["attribution"].recipe_class
    with pytest.raises((ValidationError, InputError), match=message):
        recipe.model_validate({"kind": "attribution", "model": "tiny", "prompts": PROMPTS, **KEYS, **keys})


def test_the_shipped_recipe_is_valid() -> None:
    kinds = {name: one.recipe_class for name, one in EXPERIMENTS.items()}
    (found,) = load_recipe_file("neuron-circuit", kinds=kinds)
    assert found.recipe.kind == "attribution"


def test_what_a_model_lacks_is_said_before_anything_runs() -> None:
    of = model("llama")
    with pytest.raises(InputError, match="verify needs a component with heads or neurons"):
        attribution(of, text(CLEAN), components=("resid_post",), verify={})
    with pytest.raises(InputError, match="no mlp_gate"):
        attribution(model("gpt2"), text(CLEAN), components=("mlp_gate",))


def test_edges_are_stored_with_their_names() -> None:
    tree: xr.DataTree = attribution(model("llama"), PROMPTS, methods=("edge", "atp"))
    edge = tree["attribution/edges"]["edge"]
    assert edge.dims == ("prompt", "sender", "receiver")
    assert np.isnan(edge.sel(sender="mlp_out[1]", receiver="mlp_out[1]").values).all()
    assert np.isfinite(edge.sel(sender="mlp_out[0]", receiver="q[1][2]").values).all()
    assert schema.check_tree(tree) == []
    assert any("edges" in table.title for table in summarise(tree).tables)


@pytest.mark.slow
def test_facts_of_smollm2(smollm2: nsp.Model) -> None:
    tree = attribution(
        smollm2, {"set": "fact-questions", "size": 3}, methods=("relp", "atp"), donor="mean", reference="own",
        verify={"exact": "top", "ablations": ["mean"], "sizes": [0.02, 0.05, 0.5, 1.0], "curve_draws": 1},
    )  # fmt: skip
    assert [text.strip() for text in tree["inputs"]["target"].values] == ["Austin", "Paris", "Berlin"]
    knocked, base = tree["circuit/knockout"].to_dataset(), tree["baseline"]["logit_diff"].values
    own = np.abs(knocked["circuit"].values - base)
    assert (own > np.abs(knocked["random"].values - base[:, None]).max(axis=1)).all()
    assert float(agreement(tree)["spearman"].sel(component="atp").min()) > 0.9
    faithful = curves(tree, "mean")["faithfulness"]
    assert faithful.sel(component="relp").values[1] > 0.7 > faithful.sel(component="random").values[1] + 0.1


@pytest.mark.slow
def test_smollm2_answers_the_built_in_questions(smollm2: nsp.Model) -> None:
    from nsp.datasets.fact_questions import FACT_QUESTIONS

    tree = attribution(smollm2, "fact-questions", methods=("atp",))
    assert tree["inputs"].sizes["prompt"] == len(FACT_QUESTIONS) >= 20
    assert "left_out" not in tree["inputs"].attrs
