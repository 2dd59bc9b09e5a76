"""The activation-patching recipe, from its pairs to its store, on tiny models and against raw hooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import (
    CLEAN,
    CORRUPT,
    HEADS,
    LAYERS,
    Both,
    both,
    model,
    one_thread,  # noqa: F401
    text,
)
from hooks_reference import Edit, replacing

import nsp
from nsp.experiments import EXPERIMENTS, run
from nsp.experiments.activation_patching.experiment import ActivationPatching
from nsp.experiments.experiment import Experiment, Unit
from nsp.metrics import METRICS, Metric

KIND = "activation-patching"
PAIRS = [
    {"clean": text(CLEAN), "corrupt": text(CORRUPT), "answer": "w4", "distractor": "w9", "name": "first"},
    {"clean": text([3, 1, 4, 1]), "corrupt": text([3, 9, 4, 2]), "answer": "w7", "distractor": "w20"},
    {"clean": text(CLEAN[2:8]), "corrupt": text(CORRUPT[2:8]), "answer": "w1", "distractor": "w2"},
]


def job_of(of: nsp.Model, **keys: Any) -> Experiment[Any]:
    experiment = EXPERIMENTS[KIND]
    recipe = experiment.recipe_class.model_validate({"kind": KIND, "model": "tiny", "pairs": PAIRS, **keys})
    return experiment(of, recipe)


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
    tree = ran(pair_of.model, tmp_path / "x.zarr", mode=mode, components=["resid_post", "z"], heads="1,3")
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
        for name in ("resid_post", "z"):
            found = tree[f"effects/{name}"].to_dataset().isel(pair=number)
            units = [None] if name == "resid_post" else [1, 3]
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
    base, donor = (baseline[f"logit_diff_{name}"].values[:, None, None] for name in ("clean", "corrupt"))
    np.testing.assert_allclose(found["effect"], (base - found["logit_diff"].values) / (base - donor), atol=1e-4)


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
    found = {"logit_diff", "effect", "recovery_logit_diff", "kl", "effect_kl", "recovery_kl"}
    assert found == set(tree["effects/z"].data_vars)
    assert {"logit_diff_clean", "logit_diff_corrupt", "kl_clean", "kl_corrupt"} == set(tree["baseline"].data_vars)
    assert {"change_norm", "fired"} == set(tree["receipts/z"].data_vars)
    attrs = tree.attrs
    assert attrs["kind"] == KIND
    assert attrs["plan_hash"]
    assert attrs["model"]["weights_hash"]
    assert attrs["model"]["dtype"] == "float32"
    assert {"nsp", "torch", "transformers"} <= set(attrs["versions"])
    again = EXPERIMENTS[KIND].recipe_class.model_validate(attrs["recipe_resolved"])
    assert EXPERIMENTS[KIND](both("llama").model, again).plan.hash == attrs["plan_hash"]


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
    assert isinstance(job, ActivationPatching)
    tree = ran(of, tmp_path / "x.zarr", **keys)
    assert set(tree["effects"].children) == {sweep.group for sweep in job.sweeps}
    for sweep, (number, pair) in itertools.product(job.sweeps, enumerate(PAIRS)):
        with of.trace(pair["corrupt"]) as t:
            t.sweep(nsp.patch(sweep.site, donor=pair["clean"]), axes=sweep.axes)
            for metric in job.metrics:
                tokens = metric.tokens or (pair["answer"], pair["distractor"])[: METRICS[metric.kind].tokens]
                t.measure(Metric(metric.kind, tokens, metric.reference, metric.position, metric.name))
        for metric in job.metrics:
            found = tree[f"effects/{sweep.group}"][metric.name].isel(pair=number)
            expected = t.results[metric.name]
            if "position" in found.dims:
                found = found.isel(position=slice(0, expected.sizes["position"]))
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_named_spans_of_pairs(pair_of: Both, tmp_path: Path) -> None:
    clean, corrupt = [1, 2, 40, 41, 5], [9, 40, 12, 3, 5, 6, 7]
    pair: dict[str, Any] = {"clean": text(clean), "corrupt": text(corrupt), "answer": "w4", "distractor": "w9"}
    pair["spans"] = {"who": {"clean": "w40 w41", "corrupt": "w40 w12"}}
    tree = ran(pair_of.model, tmp_path / "x.zarr", pairs=[pair], positions=["who", "last"], components=["resid_pre"])
    found = tree["effects/resid_pre"].to_dataset().isel(pair=0)
    donors = pair_of.reference.values(clean, [("resid_pre", layer) for layer in range(LAYERS)])
    assert found["token_position"].values.reshape(-1).tolist() == [1, 2, 6]
    for layer, (place, (here, there)) in itertools.product(range(LAYERS), enumerate([(1, 2), (2, 3), (6, 4)])):
        value = donors["resid_pre", layer][there]

        def change(old: torch.Tensor, here: int = here, value: torch.Tensor = value) -> torch.Tensor:
            old[here] = value
            return old

        exact = exact_difference(pair_of, pair, "corrupt", Edit("resid_pre", layer, change))
        np.testing.assert_allclose(found["logit_diff"].sel(layer=layer)[place], exact, rtol=0, atol=5e-5)


def test_the_recipe_has_a_python_door(tmp_path: Path) -> None:
    """DESIGN.md: nsp.experiments.activation_patching(model, pairs, components=[...], mode=...)."""
    of = both("llama").model
    pairs = [nsp.pair(**pair) for pair in PAIRS]
    found = nsp.experiments.activation_patching(of, pairs, components=["resid_post", "z"], mode="noising")
    stored = ran(of, tmp_path / "x.zarr", components=["resid_post", "z"], mode="noising")
    assert_same_numbers(found, stored)


def assert_same_numbers(one: xr.DataTree, other: xr.DataTree) -> None:
    """Every variable of every group, with its labels; how the work was cut into units may differ."""
    assert {node.path for node in one.subtree} == {node.path for node in other.subtree}
    for node in one.subtree:
        assert set(node.data_vars) == set(other[node.path].data_vars)
        for name, array in node.data_vars.items():
            twin = other[node.path][name]
            assert array.dims == twin.dims
            for dim in array.dims:
                np.testing.assert_array_equal(array[dim], twin[dim])
            if array.dtype.kind in "fi":
                scale = 100 if str(name).startswith("recovery") else 1  # in percent
                np.testing.assert_allclose(array, twin, rtol=0, atol=2e-5 * scale, err_msg=f"{node.path}/{name}")
            else:
                np.testing.assert_array_equal(array, twin)


# Units of work


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsp.experiments.activation_patching.experiment._UNIT_FLOP", 5e6)


KEYS = {"components": ["resid_post", "z"], "heads": "all", "mode": "noising"}


def test_a_run_in_many_units_is_the_run_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = both("llama").model
    whole = ran(of, tmp_path / "one.zarr", **KEYS)
    one = len(job_of(of, **KEYS).units)
    for flop in (2e7, 1e5):
        monkeypatch.setattr("nsp.experiments.activation_patching.experiment._UNIT_FLOP", flop)
        assert len(job_of(of, **KEYS).units) > one
        parts = ran(of, tmp_path / f"{flop}.zarr", **KEYS)
        assert_same_numbers(parts, whole)
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
            patched.setattr("nsp.experiments.activation_patching.experiment._UNIT_FLOP", flop)
            jobs = [job_of(both("llama").model, **KEYS, memory=memory) for memory in ("4GB", "300KB", "150KB", "80KB")]
        assert len({job.plan.hash for job in jobs}) == 1
        for job in jobs:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("nsp.experiments.activation_patching.experiment._UNIT_FLOP", flop)
                tilings.setdefault(f"{flop:.3g}", set()).add(repr(job.units))
    assert {flop: len(found) for flop, found in tilings.items()} == dict.fromkeys(tilings, 1)


class Killed(BaseException):
    """A kill between two units: nothing catches it."""


def killing(after: int, log: list[int]) -> Callable[[ActivationPatching, Unit, Any, Any], Any]:
    """`ActivationPatching.compute`, which stops the process's work after a number of units."""
    whole = ActivationPatching.compute

    def compute(self: ActivationPatching, unit: Unit, stored: Any, progress: Any = None) -> Any:
        if len(log) == after:
            raise Killed
        log.append(unit.index)
        return whole(self, unit, stored, progress)

    return compute


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
            patched.setattr(ActivationPatching, "compute", killing(after, log))
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
