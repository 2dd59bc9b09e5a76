"""Activation patching: the known figures of the Mary/John pair, and the recipe from its pairs to its store."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, HEADS, LAYERS, Both, both, model, text
from hooks_reference import Edit, HookedReference, replacing

import nsp
from nsp.experiments import EXPERIMENTS, run
from nsp.experiments.job import Job, Unit
from nsp.experiments.patching import PatchingJob

KIND = "activation-patching"
# Issue 2, acceptance 2: plain transformers and TransformerLens give these on the same file.
CLEAN_DIFFERENCE, CORRUPT_DIFFERENCE = 6.1196, -5.4853
FIGURES = {(10, 9): 6.1124, (0, 9): 6.1267, (20, 13): -1.6562, (29, 13): 6.1196}
CLOSE = {"rtol": 0, "atol": 0.002}


# The figures


def assert_figures(found: xr.DataArray) -> None:
    """A sweep of resid_post in logit differences, dims (layer, position), against the known figures."""
    assert found.sizes["layer"] == 30
    assert found.sizes["position"] == 14
    for (layer, position), value in FIGURES.items():
        np.testing.assert_allclose(found.sel(layer=layer, position=position), value, **CLOSE)
    shared = found.sel(position=slice(0, 8))
    np.testing.assert_allclose(shared, CORRUPT_DIFFERENCE, **CLOSE)
    np.testing.assert_allclose(shared, shared[0, 0], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def hooks(smollm2: nsp.Model) -> HookedReference:
    """Plain transformers with hooks, on the same float32 weights."""
    return HookedReference(smollm2.module)


@pytest.fixture(scope="module")
def ids(tokenizer: Any, ioi_pair: nsp.Pair) -> dict[str, Any]:
    tokens = {name: tokenizer(getattr(ioi_pair, name))["input_ids"] for name in ("clean", "corrupt")}
    return {**tokens, "answer": tokenizer(" Mary")["input_ids"][0], "distractor": tokenizer(" John")["input_ids"][0]}


def test_the_figures_by_plain_transformers(hooks: HookedReference, ids: dict[str, Any]) -> None:
    def difference(prompt: list[int], *edits: Edit) -> float:
        logits = hooks.logits(prompt, edits)[-1]
        return float(logits[ids["answer"]] - logits[ids["distractor"]])

    np.testing.assert_allclose(difference(ids["clean"]), CLEAN_DIFFERENCE, **CLOSE)
    np.testing.assert_allclose(difference(ids["corrupt"]), CORRUPT_DIFFERENCE, **CLOSE)
    donors = hooks.values(ids["clean"], [("resid_post", layer) for layer, _ in FIGURES])
    for (layer, position), value in FIGURES.items():
        edit = Edit("resid_post", layer, replacing(donors["resid_post", layer], [position], None))
        np.testing.assert_allclose(difference(ids["corrupt"], edit), value, **CLOSE)


def test_the_figures_by_a_trace_sweep(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    with smollm2.trace(ioi_pair.corrupt) as t:
        t.sweep(nsp.patch("resid_post[*] @ *", donor=ioi_pair.clean))
        t.measure(nsp.logit_diff(" Mary", " John"))
    assert_figures(t.results["logit_diff"])
    assert t.receipts[0].path == "branch"
    np.testing.assert_allclose(t.results["logit_diff_donor"], CLEAN_DIFFERENCE, **CLOSE)
    np.testing.assert_allclose(t.results["logit_diff_base"], CORRUPT_DIFFERENCE, **CLOSE)
    effect = t.results["effect"]
    np.testing.assert_allclose(effect.sel(layer=29, position=13), 1, atol=1e-5)
    assert (effect.sel(position=slice(0, 8)) == 0).all()
    # All that is known to be zero is pruned: nine shared tokens, and the last layer's tokens that nothing reads.
    assert (t.receipts[0].branches, t.receipts[0].unchanged) == (29 * 5 + 1, 420 - 29 * 5 - 1)


def test_the_figures_by_single_counterfactuals(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    for (layer, position), value in FIGURES.items():
        with smollm2.trace(ioi_pair.corrupt) as t:
            t.patch(f"resid_post[{layer}] @ {position}", donor=ioi_pair.clean)
            t.measure(nsp.logit_diff(" Mary", " John"))
        np.testing.assert_allclose(t.results["logit_diff"], value, **CLOSE)


def test_the_figures_by_the_shipped_recipe(smollm2: nsp.Model, tmp_path: Path) -> None:
    from nsp.recipe import find_recipe, load_recipe_file

    kinds = {KIND: EXPERIMENTS[KIND].recipe}
    (item,) = load_recipe_file(find_recipe("ioi"), [f"out={tmp_path / 'ioi.zarr'}"], kinds=kinds)
    run(EXPERIMENTS[KIND].prepare(smollm2, item.recipe), out=item.out, progress=False)
    tree = xr.open_datatree(item.out, engine="zarr", consolidated=False)
    assert_figures(tree["effects/resid_post"]["logit_diff"].squeeze("pair"))
    np.testing.assert_allclose(tree["baseline"]["logit_diff_clean"], CLEAN_DIFFERENCE, **CLOSE)
    np.testing.assert_allclose(tree["baseline"]["logit_diff_corrupt"], CORRUPT_DIFFERENCE, **CLOSE)
    assert float(tree["effects/resid_post"]["logit_diff"].sel(layer=10, position=9)) == pytest.approx(6.1124, abs=0.002)
    words = tree["effects/resid_post"]["token_text"].values.reshape(-1).tolist()
    assert words[:4] == ["When", " Mary", " and", " John"]
    summary = EXPERIMENTS[KIND].summarise(tree)
    assert "clean 6.1196, corrupt -5.4853" in "\n".join(summary.lines)
    rows = summary.tables[0].rows
    assert {row[:3] for row in rows} & {(0, 9, "' Mary'"), (29, 13, "' to'")}


@pytest.mark.parametrize("component", ["k", "z", "mlp_neurons", "resid_mid", "pattern"])
def test_a_sample_of_each_component_against_hooks(
    smollm2: nsp.Model, hooks: HookedReference, ids: dict[str, Any], component: str
) -> None:
    unit = {"k": 2, "z": 5, "mlp_neurons": 1000, "pattern": 3}.get(component)
    cells = [(3, 9), (17, 11), (29, 13)]
    donors = hooks.values(ids["clean"], [(component, layer) for layer, _ in cells])
    site = f"{component}[3,17,29]{'' if unit is None else f'[{unit}]'} @ 9,11,13"
    with smollm2.trace(ids["corrupt"], path="branch") as t:
        t.sweep(nsp.patch(site, donor=ids["clean"]))
        t.measure(nsp.logit(ids["answer"]))
    for layer, position in cells:
        units = None if unit is None else [unit]
        edit = Edit(component, layer, replacing(donors[component, layer], [position], units))
        exact = float(hooks.logits(ids["corrupt"], [edit])[-1, ids["answer"]])
        found = float(t.results["logit"].sel(layer=layer, position=position).squeeze())
        assert found == pytest.approx(exact, abs=1e-4), (layer, position)


# Properties on the real model (issue 2, acceptance 3)


@pytest.mark.parametrize(
    "component",
    ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "mlp_gate", "mlp_up"]
    + ["mlp_neurons"],
)
def test_a_self_patch_and_a_scale_by_one_change_no_bit(smollm2: nsp.Model, ioi_pair: nsp.Pair, component: str) -> None:
    with smollm2.trace(ioi_pair.corrupt) as t:
        t.patch(f"{component}[7,18]", donor=ioi_pair.corrupt)
        t.scale(f"{component}[12]", 1.0)
        t.measure(nsp.logit_diff(" Mary", " John"), nsp.l2("base"))
    assert all(receipt.fired > 0 and receipt.change_max == 0 for receipt in t.receipts)
    assert float(t.results["logit_diff"]) == float(t.results["logit_diff_base"])
    assert float(t.results["l2"]) == 0


def test_a_self_patch_on_the_branch_path(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    """The recording stands for another prompt, so that nothing is known to be equal and every branch runs."""
    with smollm2.trace(ioi_pair.corrupt) as t:
        t.record("resid_post[5,25]", "z[5,25]")
    for name in ("resid_post", "z"):
        donor = t.results[f"activations/{name}/{name}"]
        with smollm2.trace(ioi_pair.corrupt, path="branch") as again:
            again.sweep(nsp.patch(f"{name}[5,25] @ *", donor=donor))
            again.measure(nsp.logit_diff(" Mary", " John"))
        assert again.receipts[0].branches == 28
        base = float(again.results["logit_diff_base"])
        np.testing.assert_allclose(again.results["logit_diff"], base, rtol=0, atol=5e-5)


def test_every_position_together_is_the_donors_run(
    smollm2: nsp.Model, ioi_pair: nsp.Pair, hooks: HookedReference, ids: Any
) -> None:
    with smollm2.trace(ioi_pair.corrupt) as t:
        t.patch("resid_post[14]", donor=ioi_pair.clean)
        t.record("logits")
    np.testing.assert_allclose(t.results["logits"], hooks.logits(ids["clean"]), atol=2e-3)


def test_all_heads_together_are_z(smollm2: nsp.Model, ioi_pair: nsp.Pair) -> None:
    found = []
    for units in ("", "[*]"):
        with smollm2.trace(ioi_pair.corrupt) as t:
            t.patch(f"z[20:24]{units} @ 9:14", donor=ioi_pair.clean)
            t.measure(nsp.logit_diff(" Mary", " John"))
        found.append(float(t.results["logit_diff"]))
    assert found[0] == found[1]
    assert found[0] != pytest.approx(CORRUPT_DIFFERENCE, abs=0.01)


def test_one_is_many_is_padded(smollm2: nsp.Model, ioi_pair: nsp.Pair, tokenizer: Any) -> None:
    prompts = [
        ioi_pair.corrupt,
        "The",
        "In the town of York there is a very old and a rather tall church",
        ioi_pair.clean,
    ]

    def run_on(prompt: Any) -> xr.DataArray:
        with smollm2.trace(prompt) as t:
            t.scale("attn_out[11] @ last", 0.0)
            t.measure(nsp.logit_diff(" Mary", " John"))
        return t.results["logit_diff"]

    many = run_on(prompts)
    for number, prompt in enumerate(prompts):
        np.testing.assert_allclose(many[number], run_on(prompt), rtol=0, atol=1e-4)
    # transformers' own padded batch, on the left.
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = smollm2.module(**batch, position_ids=places).logits[:, -1]
    mary, john = (tokenizer(word)["input_ids"][0] for word in (" Mary", " John"))
    with smollm2.trace(prompts) as t:
        t.measure(nsp.logit_diff(" Mary", " John"))
    np.testing.assert_allclose(t.results["logit_diff"], logits[:, mary] - logits[:, john], rtol=0, atol=1e-4)


# The recipe, on tiny models


PAIRS = [
    {"clean": text(CLEAN), "corrupt": text(CORRUPT), "answer": "w4", "distractor": "w9", "name": "first"},
    {"clean": text([3, 1, 4, 1]), "corrupt": text([3, 9, 4, 2]), "answer": "w7", "distractor": "w20"},
    {"clean": text(CLEAN[2:8]), "corrupt": text(CORRUPT[2:8]), "answer": "w1", "distractor": "w2"},
]


def job_of(of: nsp.Model, **keys: Any) -> Job:
    experiment = EXPERIMENTS[KIND]
    recipe = experiment.recipe.model_validate({"kind": KIND, "model": "tiny", "pairs": PAIRS, **keys})
    return experiment.prepare(of, recipe)


def ran(of: nsp.Model, out: Path, **keys: Any) -> xr.DataTree:
    run(job_of(of, **keys), out=out, progress=False)
    return xr.open_datatree(out, engine="zarr", consolidated=False)


def exact_difference(which: Both, pair: dict[str, Any], base: str, *edits: Edit) -> float:
    answer, distractor = (int(pair[key][1:]) for key in ("answer", "distractor"))
    logits = which.reference.logits(ids_of(pair[base]), edits)[-1]
    return float(logits[answer] - logits[distractor])


def ids_of(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


@pytest.fixture(params=["llama", "gpt2"])
def pair_of(request: pytest.FixtureRequest) -> Both:
    return both(request.param)


@pytest.mark.parametrize("mode", ["denoising", "noising", "interchange"])
def test_every_cell_of_a_recipe_against_hooks(pair_of: Both, mode: str, tmp_path: Path) -> None:
    tree = ran(pair_of.model, tmp_path / "x.zarr", mode=mode, components=["resid_post", "z", "v"], heads="all")
    items = [
        (pair, base)
        for pair in PAIRS
        for base in {"denoising": ["corrupt"], "noising": ["clean"], "interchange": ["corrupt", "clean"]}[mode]
    ]
    inputs, baseline = tree["inputs"], tree["baseline"]
    assert inputs["base"].values.tolist() == [base for _, base in items]
    assert inputs["pair_name"].values.tolist()[0] == "first"
    for number, (pair, base) in enumerate(items):
        other = {"clean": "corrupt", "corrupt": "clean"}[base]
        start, goal = exact_difference(pair_of, pair, base), exact_difference(pair_of, pair, other)
        np.testing.assert_allclose(baseline[f"logit_diff_{base}"][number], start, atol=5e-5)
        np.testing.assert_allclose(baseline[f"logit_diff_{other}"][number], goal, atol=5e-5)
        length = len(ids_of(pair[base]))
        assert inputs[f"token_id_{base}"].values[number].tolist()[:length] == ids_of(pair[base])
        for name in ("resid_post", "z", "v"):
            found = tree[f"effects/{name}"].to_dataset().isel(pair=number)
            units = [None] if name == "resid_post" else range(found.sizes["head"])
            donors = pair_of.reference.values(ids_of(pair[other]), [(name, layer) for layer in range(LAYERS)])
            assert np.isnan(found["effect"].isel(position=slice(length, None))).all()
            assert (tree[f"receipts/{name}"]["fired"].isel(pair=number, position=slice(length, None)) == -1).all()
            for layer, position, unit in itertools.product(range(LAYERS), range(length), units):
                change = replacing(donors[name, layer], [position], None if unit is None else [unit])
                exact = exact_difference(pair_of, pair, base, Edit(name, layer, change))
                cell = found.sel(layer=layer, position=position, **({} if unit is None else {"head": unit}))
                np.testing.assert_allclose(cell["logit_diff"], exact, rtol=0, atol=5e-5)
                np.testing.assert_allclose(cell["effect"], (exact - start) / (goal - start), rtol=0, atol=1e-3)


def test_noising_is_normalised_as_the_issue_writes_it(tmp_path: Path) -> None:
    tree = ran(both("llama").model, tmp_path / "x.zarr", mode="noising", components=["mlp_out"])
    found, baseline = tree["effects/mlp_out"].to_dataset(), tree["baseline"].to_dataset()
    base, donor = baseline["logit_diff_clean"], baseline["logit_diff_corrupt"]
    xr.testing.assert_allclose(found["effect"], (base - found["logit_diff"]) / (base - donor), atol=1e-4)


def test_a_store_explains_itself(tmp_path: Path) -> None:
    """Every number in it has a label, a unit and a method, and the run can be repeated from what it holds."""
    tree = ran(both("llama").model, tmp_path / "x.zarr", components=["resid_post", "z"], metric=["logit_diff", "kl"])
    known = {"pair", "layer", "position", "head", "neuron", "token"}
    for node in tree.subtree:
        assert set(node.dims) <= known
        for name, array in node.data_vars.items():
            assert {"units", "long_name", "method"} <= set(array.attrs), f"{node.path}/{name}"
        for dim in node.dims:
            assert str(dim) in node.coords, f"{node.path}: {dim}"
    assert {"logit_diff", "effect", "kl", "effect_kl"} == set(tree["effects/z"].data_vars)
    assert {"logit_diff_clean", "logit_diff_corrupt", "kl_clean", "kl_corrupt"} == set(tree["baseline"].data_vars)
    assert {"change_norm", "fired"} == set(tree["receipts/z"].data_vars)
    attrs = tree.attrs
    assert attrs["kind"] == KIND
    assert attrs["plan_hash"]
    assert attrs["model"]["weights_hash"]
    assert attrs["model"]["dtype"] == "float32"
    assert {"nsp", "torch", "transformers"} <= set(attrs["versions"])
    again = EXPERIMENTS[KIND].recipe.model_validate(attrs["recipe_resolved"])
    assert EXPERIMENTS[KIND].prepare(both("llama").model, again).plan.hash == attrs["plan_hash"]


@pytest.mark.parametrize(
    "keys",
    [
        {"layers": "1:", "positions": "last"},
        {"layers": [0, 2], "positions": [0, 1, 3]},
        {"together": ["position"], "components": ["resid_post", "mlp_out"]},
        {"together": ["layer"], "components": ["z"], "heads": [1, 3], "positions": "-1"},
        {"components": ["mlp_neurons"], "neurons": "5,7", "positions": [2], "metric": ["kl", "logit"]},
        {"sites": ["z[1][2] @ last", "z[0:2] @ 1,2", "embed @ *", "pattern[1][0] @ -1"]},
        {"components": ["k"], "metric": [{"kind": "prob", "tokens": ["w3"], "position": 2, "name": "p3"}]},
    ],
    ids=str,
)
def test_selections_of_a_recipe(keys: dict[str, Any], tmp_path: Path) -> None:
    """Every selector's group is what a trace of the same sweep on the same pair gives."""
    of = both("llama").model
    job = job_of(of, **keys)
    assert isinstance(job, PatchingJob)
    tree = ran(of, tmp_path / "x.zarr", **keys)
    assert set(tree["effects"].children) == {sweep.group for sweep in job.sweeps}
    for sweep, (number, pair) in itertools.product(job.sweeps, enumerate(PAIRS)):
        with of.trace(pair["corrupt"]) as t:
            t.sweep(nsp.patch(sweep.site, donor=pair["clean"]), axes=sweep.axes) if sweep.axes else t.patch(
                sweep.site, donor=pair["clean"]
            )
            for metric in job.metrics:
                tokens = metric.tokens or (pair["answer"], pair["distractor"])[: nsp_tokens(metric)]
                t.measure(nsp.Metric(metric.kind, tokens, metric.reference, metric.position, metric.name))
        for metric in job.metrics:
            found = tree[f"effects/{sweep.group}"][metric.name].isel(pair=number)
            expected = t.results[metric.name]
            if "position" in found.dims:
                found = found.isel(position=slice(0, expected.sizes["position"]))
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def nsp_tokens(metric: nsp.Metric) -> int:
    from nsp.metrics import METRICS

    return METRICS[metric.kind].tokens


def test_named_spans_of_pairs(pair_of: Both, tmp_path: Path) -> None:
    pairs = [
        {
            "clean": text([1, 2, 40, 41, 5]),
            "corrupt": text([9, 40, 12, 3, 5, 6, 7]),
            "answer": "w4",
            "distractor": "w9",
            "spans": {"who": {"clean": "w40 w41", "corrupt": "w40 w12"}},
        }
    ]
    tree = ran(pair_of.model, tmp_path / "x.zarr", pairs=pairs, positions=["who", "last"], components=["resid_pre"])
    found = tree["effects/resid_pre"].to_dataset().isel(pair=0)
    clean, corrupt = (ids_of(pairs[0][key]) for key in ("clean", "corrupt"))  # type: ignore[arg-type]
    donors = pair_of.reference.values(clean, [("resid_pre", layer) for layer in range(LAYERS)])
    assert found["token_position"].values.reshape(-1).tolist() == [1, 2, 6]
    for layer, (place, (here, there)) in itertools.product(range(LAYERS), enumerate([(1, 2), (2, 3), (6, 4)])):
        value = donors["resid_pre", layer][there]

        def change(old: torch.Tensor, here: int = here, value: torch.Tensor = value) -> torch.Tensor:
            old[here] = value
            return old

        exact = exact_difference(pair_of, pairs[0], "corrupt", Edit("resid_pre", layer, change))
        assert corrupt
        np.testing.assert_allclose(found["logit_diff"].sel(layer=layer)[place], exact, rtol=0, atol=5e-5)


def test_the_recipe_has_a_python_door(tmp_path: Path) -> None:
    """DESIGN.md: nsp.experiments.activation_patching(model, pairs, components=[...], mode=...)."""
    of = both("llama").model
    pairs = [nsp.pair(**pair) for pair in PAIRS]
    found = nsp.experiments.activation_patching(of, pairs, components=["resid_post", "z"], mode="noising")
    stored = ran(of, tmp_path / "x.zarr", components=["resid_post", "z"], mode="noising")
    for name in ("resid_post", "z"):
        xr.testing.assert_allclose(found[f"effects/{name}"].to_dataset(), stored[f"effects/{name}"].to_dataset())


# Units of work


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsp.experiments.patching._UNIT_FLOP", 5e6)


KEYS = {"components": ["resid_post", "z"], "heads": "all", "mode": "interchange"}


def test_a_run_in_many_units_is_the_run_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = both("llama").model
    whole = ran(of, tmp_path / "one.zarr", **KEYS)
    one = len(job_of(of, **KEYS).units)
    for flop in (3e7, 5e6, 1e5):
        monkeypatch.setattr("nsp.experiments.patching._UNIT_FLOP", flop)
        assert len(job_of(of, **KEYS).units) > one
        parts = ran(of, tmp_path / f"{flop}.zarr", **KEYS)
        xr.testing.assert_allclose(parts, whole, atol=2e-5)
    # The smallest split goes over layers too.
    assert any("layer" in region for unit in job_of(of, **KEYS).units for region in unit.regions.values())


@pytest.mark.usefixtures("small_units")
def test_units_cover_every_cell_once(tmp_path: Path) -> None:
    job = job_of(both("llama").model, **KEYS)
    template = job.template()
    for group in ("effects/resid_post", "effects/z", "receipts/z", "baseline"):
        sizes = template[group].sizes
        seen = np.zeros([sizes[dim] for dim in ("pair", "layer") if dim in sizes], dtype=int)
        for unit in job.units:
            if group in unit.regions:
                region = unit.regions[group]
                seen[tuple(region.get(dim, slice(None)) for dim in ("pair", "layer") if dim in sizes)] += 1
        assert (seen == 1).all(), group


@pytest.mark.usefixtures("small_units")
def test_units_are_the_same_whatever_the_memory() -> None:
    """A run is resumed by its plan's hash, perhaps on another machine: its units must follow from the plan alone."""
    tilings: dict[str, set[str]] = {}
    for flop in np.geomspace(1e6, 1e9, 13):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("nsp.experiments.patching._UNIT_FLOP", flop)
            jobs = [job_of(both("llama").model, **KEYS, memory=memory) for memory in ("4GB", "300KB", "150KB", "80KB")]
        assert len({job.plan.hash for job in jobs}) == 1
        for job in jobs:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("nsp.experiments.patching._UNIT_FLOP", flop)
                tilings.setdefault(f"{flop:.3g}", set()).add(repr(job.units))
    assert {flop: len(found) for flop, found in tilings.items()} == dict.fromkeys(tilings, 1)


class Killed(BaseException):
    """A kill between two units: nothing catches it."""


def killing(after: int, log: list[int]) -> Callable[[PatchingJob, Unit, Any], Any]:
    """`PatchingJob.run_unit`, which stops the process's work after a number of units."""
    whole = PatchingJob.run_unit

    def run_unit(self: PatchingJob, unit: Unit, progress: Any = None) -> Any:
        if len(log) == after:
            raise Killed
        log.append(unit.index)
        return whole(self, unit, progress)

    return run_unit


@pytest.mark.usefixtures("small_units")
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = both("llama").model
    whole = ran(of, tmp_path / "whole.zarr", **KEYS)
    units = len(job_of(of, **KEYS).units)
    out, done = tmp_path / "x.zarr", []
    for after in (2, 3, units):
        log: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr(PatchingJob, "run_unit", killing(after, log))
            try:
                ran(of, out, **KEYS)
            except Killed:
                half = xr.open_datatree(out, engine="zarr", consolidated=False)
                assert np.isnan(half["effects/z"]["effect"]).any()
                assert half.attrs["plan_hash"] == whole.attrs["plan_hash"]
        done += log
    assert sorted(done) == list(range(units))  # nothing twice, nothing left out
    tree = xr.open_datatree(out, engine="zarr", consolidated=False)
    xr.testing.assert_equal(tree, whole)


@pytest.mark.usefixtures("small_units")
def test_a_store_of_another_plan_is_kept(tmp_path: Path) -> None:
    of, out = both("llama").model, tmp_path / "x.zarr"
    before = ran(of, out, components=["mlp_out"]).load()
    for other in ({"components": ["attn_out"]}, {"components": ["mlp_out"], "mode": "noising"}, {"seed": 4}):
        with pytest.raises(nsp.InputError, match="another"):
            ran(of, out, **other)
    with pytest.raises(nsp.InputError, match="another"):
        ran(model("llama", 4), out, components=["mlp_out"])  # other weights
    xr.testing.assert_identical(xr.open_datatree(out, engine="zarr", consolidated=False), before)
    run(job_of(of, components=["attn_out"]), out=out, progress=False, force=True)
    assert set(xr.open_datatree(out, engine="zarr", consolidated=False)["effects"].children) == {"attn_out"}


# What is wrong is said before anything is written


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": [3]}, "0 to 2"),
        ({"layers": "7:9"}, "selects nothing|0 to 2"),
        ({"positions": [9]}, "position"),
        ({"positions": "subject"}, "subject"),
        ({"components": ["z"], "heads": [HEADS]}, "0 to 3"),
        ({"sites": ["mlp_neurons[1][48] @ last"]}, "0 to 47"),
        ({"sites": ["module:model.layers.9.mlp @ last"]}, "submodule"),
        ({"memory": "2KB"}, "memory"),
        (
            {"pairs": [{"clean": "w1 w2", "corrupt": "w1", "answer": "w3", "distractor": "w4"}]},
            "2 tokens, the donor|cannot pair",
        ),
        ({"pairs": [{"clean": "w1 w2", "corrupt": "w1 w5", "answer": "w3 w4", "distractor": "w4"}]}, "2 tokens"),
        ({"pairs": [{"clean": "w1 w2", "corrupt": "w1 w5", "answer": "w99", "distractor": "w4"}]}, "vocabulary"),
        ({"pairs": [{"clean": [1, 61], "corrupt": [1, 5], "answer": "w9", "distractor": "w4"}]}, "61"),
        (
            {
                "pairs": [{"clean": "w1", "corrupt": "w2", "answer": "w3", "distractor": "w4"}],
                "metric": {"kind": "logit", "position": 3},
            },
            "position",
        ),
        ({"metric": {"kind": "logit", "tokens": [61]}}, "61"),
    ],
    ids=str,
)
def test_wrong_recipes_leave_no_store(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(nsp.InputError, match=message):
        ran(both("llama").model, tmp_path / "x.zarr", **keys)
    assert list(tmp_path.iterdir()) == []
