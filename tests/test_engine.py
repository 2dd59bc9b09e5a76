"""The branch path, the plain path and raw hooks give the same numbers, for every component and way of stating it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import (
    CLEAN,
    CORRUPT,
    LAYERS,
    NEURONS,
    Both,
    both,
    model,
    one_thread,  # noqa: F401
    reference,
)
from hooks_reference import Edit, computing, replacing

import nsp

PATHS = ("branch", "plain")
LLAMA = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern")
LLAMA += ("mlp_gate", "mlp_up", "mlp_neurons", "embed", "module")
SITES = [("llama", name) for name in LLAMA] + [("gpt2", name) for name in LLAMA if name != "mlp_gate"]
# The model runs in float32, the reference in float64; logits are of order one.
CLOSE = {"atol": 5e-5, "rtol": 0}
# A full-vocabulary distance and logits before, at and after most of the swept positions.
METRICS = (
    nsp.logit(4, name="last"),
    nsp.logit_diff(9, 30, position="5", name="middle"),
    nsp.logit(9, position="2", name="early"),
    nsp.kl("base", name="kl"),
)


@pytest.fixture(params=["llama", "gpt2"])
def pair_of(request: pytest.FixtureRequest) -> Both:
    return both(request.param)


def named(which: Both, component: str) -> str:
    return which.submodule() if component == "module" else component


def layered(component: str) -> bool:
    return component != "embed" and not component.startswith("module:")


def swept(of: nsp.Model, base: Any, *sweep: Any, path: str, axes: Any = None, **statements: Any) -> xr.Dataset:
    """A sweep's results; ``fixed`` interventions, ``metrics`` and ``memory`` as stated."""
    with of.trace(base, path=path, memory=statements.get("memory")) as t:
        t.sweep(*sweep, axes=axes)
        t.add(*statements.get("fixed", ()))
        t.measure(*statements.get("metrics", METRICS))
    assert {receipt.path for receipt in t.receipts} == {path}
    return t.results


def by_path(of: nsp.Model, base: Any, *sweep: Any, **statements: Any) -> xr.Dataset:
    """The same sweep by both paths, along a dim ``path``."""
    return xr.concat([swept(of, base, *sweep, path=path, **statements) for path in PATHS], "path")


def by_hand(which: Both, base: Sequence[int], edits: Sequence[Edit]) -> dict[str, float]:
    """Every metric of `METRICS` from the hooks reference, in float64."""
    plain, new = which.reference.logits(base), which.reference.logits(base, edits)
    here, there = torch.log_softmax(plain[-1], 0), torch.log_softmax(new[-1], 0)
    return {
        "last": float(new[-1, 4]),
        "middle": float(new[5, 9] - new[5, 30]),
        "early": float(new[2, 9]),
        "kl": float((here.exp() * (here - there)).sum()),
    }


def assert_cells(found: xr.Dataset, expected: Callable[[dict[str, int]], dict[str, float]], **close: float) -> None:
    """Every cell of a sweep against what ``expected`` says for its labels."""
    dims = [str(dim) for dim in found["last"].dims if dim != "path"]
    labels = [found[dim].values for dim in dims]
    for place in itertools.product(*(range(len(values)) for values in labels)):
        cell = {dim: int(values[at]) for dim, values, at in zip(dims, labels, place, strict=True)}
        for name, value in expected(cell).items():
            got = found[name].transpose(*dims, "path").values[place]
            np.testing.assert_allclose(got, [value, value], **(close or CLOSE), err_msg=f"{name} at {cell}, {PATHS}")


def donor_values(
    which: Both, component: str, layers: Sequence[int], ids: Sequence[int] = CLEAN
) -> dict[int, torch.Tensor]:
    kept = which.reference.values(ids, [(component, layer) for layer in layers])
    return {layer: kept[component, layer] for layer in layers}


# One counterfactual a cell


@pytest.mark.parametrize(("family", "name"), SITES)
def test_every_component_at_every_layer_and_position(family: str, name: str) -> None:
    which = both(family)
    component = named(which, name)
    site = f"{component}[*] @ *" if layered(component) else f"{component} @ *"
    found = by_path(which.model, CORRUPT, nsp.patch(site, donor=CLEAN))
    donors = donor_values(which, component, range(LAYERS) if layered(component) else [1])

    def expected(cell: dict[str, int]) -> dict[str, float]:
        layer = cell.get("layer", 1)
        change = replacing(donors[layer], [cell["position"]], None)
        return by_hand(which, CORRUPT, [Edit(component, layer, change)])

    assert found["last"].dims == ("path", *(("layer",) if layered(component) else ()), "position")
    assert_cells(found, expected)
    # Where the prompts share all tokens so far, the effect is exactly zero.
    for name in ("last", "middle", "early", "kl"):
        assert (found[name].sel(position=[0, 1]) == found[f"{name}_base"]).all()
    assert (found["effect"].sel(position=[0, 1]) == 0).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "z", "pattern", "mlp_gate", "mlp_up", "mlp_neurons", "module"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_and_neurons_one_by_one(family: str, name: str) -> None:
    which = both(family)
    if name == "mlp_gate" and family == "gpt2":
        pytest.skip("GPT-2 has no gate")
    component = named(which, name)
    heads = which.units(component)
    units = "*" if 0 < heads <= 4 else f"0,17,{NEURONS - 1}"
    layers = "[1,2]" if layered(component) else ""
    found = by_path(which.model, CORRUPT, nsp.patch(f"{component}{layers}[{units}] @ 3,8", donor=CLEAN))
    unit = "head" if 0 < heads <= 4 else "neuron"
    assert found["last"].dims == ("path", *(("layer",) if layers else ()), "position", unit)
    donors = donor_values(which, component, [1, 2] if layers else [1])

    def expected(cell: dict[str, int]) -> dict[str, float]:
        layer = cell.get("layer", 1)
        change = replacing(donors[layer], [cell["position"]], [cell[unit]])
        return by_hand(which, CORRUPT, [Edit(component, layer, change)])

    assert_cells(found, expected)


@pytest.mark.parametrize("name", ["resid_mid", "k", "z", "pattern", "mlp_neurons"])
@pytest.mark.parametrize("axes", [("layer",), ("position",), ("unit",), ("layer", "unit")])
def test_what_is_not_an_axis_is_patched_together(pair_of: Both, name: str, axes: tuple[str, ...]) -> None:
    heads = pair_of.units(name)
    if "unit" in axes and not heads:
        pytest.skip("no units")
    few = [0, 1] if heads and heads <= 4 else [3, 40]
    layers, positions = [0, 2], [2, 5, 7]
    site = f"{name}[0,2]{f'[{few[0]},{few[1]}]' if heads else ''} @ 2,5,7"
    found = by_path(pair_of.model, CORRUPT, nsp.patch(site, donor=CLEAN), axes=axes)
    donors = donor_values(pair_of, name, layers)
    unit = "head" if heads and heads <= 4 else "neuron"
    assert found["last"].dims == ("path", *({"unit": unit}.get(axis, axis) for axis in axes))

    def expected(cell: dict[str, int]) -> dict[str, float]:
        at = [cell["position"]] if "position" in cell else positions
        units = None if not heads else [cell[unit]] if unit in cell else few
        chosen = [cell["layer"]] if "layer" in cell else layers
        return by_hand(pair_of, CORRUPT, [Edit(name, layer, replacing(donors[layer], at, units)) for layer in chosen])

    assert_cells(found, expected)


# Several sites in one branch


def test_sites_that_move_together(pair_of: Both) -> None:
    sweep = (
        nsp.patch("z[*] @ 2:9", donor=CLEAN),
        nsp.scale("mlp_out[*] @ 2:9", 0.5),
        nsp.ablate("k[*] @ 1:8"),  # its own positions, cell by cell
    )
    found = by_path(pair_of.model, CORRUPT, *sweep)
    donors = donor_values(pair_of, "z", range(LAYERS))

    def expected(cell: dict[str, int]) -> dict[str, float]:
        layer, position = cell["layer"], cell["position"]
        edits = [
            Edit("z", layer, replacing(donors[layer], [position], None)),
            Edit("mlp_out", layer, computing(lambda old: old * 0.5, [position])),
            Edit("k", layer, computing(torch.zeros_like, [position - 1])),
        ]
        return by_hand(pair_of, CORRUPT, edits)

    assert_cells(found, expected)


def test_fixed_interventions_are_in_every_cell(pair_of: Both) -> None:
    fixed = (nsp.ablate("v[1][0] @ 4"), nsp.scale("resid_post[0] @ 6", 1.5))
    found = by_path(pair_of.model, CORRUPT, nsp.patch("attn_out[*] @ 0:8", donor=CLEAN), fixed=fixed)
    donors = donor_values(pair_of, "attn_out", range(LAYERS))
    always = [
        Edit("v", 1, computing(torch.zeros_like, [4], [0])),
        Edit("resid_post", 0, computing(lambda old: old * 1.5, [6])),
    ]

    def expected(cell: dict[str, int]) -> dict[str, float]:
        change = replacing(donors[cell["layer"]], [cell["position"]], None)
        return by_hand(pair_of, CORRUPT, [*always, Edit("attn_out", cell["layer"], change)])

    assert_cells(found, expected)
    # The base of such a sweep is the run with the fixed interventions alone.
    for name, value in by_hand(pair_of, CORRUPT, always).items():
        np.testing.assert_allclose(found[f"{name}_base"], [value, value], **CLOSE)
    zero, one = found["last_base"], found["last_donor"]
    xr.testing.assert_allclose(found["effect"], (found["last"] - zero) / (one - zero), atol=1e-4)


def test_interventions_at_one_site_act_in_the_order_stated(pair_of: Both) -> None:
    vector = torch.linspace(-1, 1, 32)
    site = "resid_post[1] @ 4"
    donors = donor_values(pair_of, "resid_pre", [2])
    for first, second, change in (
        (nsp.inject(site, vector), nsp.scale(site, 2.0), lambda old: (old + vector.double()) * 2),
        (nsp.scale(site, 2.0), nsp.inject(site, vector), lambda old: old * 2 + vector.double()),
        (nsp.inject(site, vector), nsp.patch("resid_pre[2] @ 4", donor=CLEAN), None),
    ):
        edit = Edit("resid_pre", 2, replacing(donors[2], [4], None))
        if change is not None:
            edit = Edit("resid_post", 1, computing(change, [4]))
        found = by_path(pair_of.model, CORRUPT, first, second)
        assert_cells(found, lambda _cell, edit=edit: by_hand(pair_of, CORRUPT, [edit]))


def test_attention_and_its_inputs_in_one_layer(pair_of: Both) -> None:
    names = ("q", "k", "v", "pattern", "z", "attn_out", "resid_mid")
    donors = {name: donor_values(pair_of, name, [1])[1] for name in names}
    for count in range(2, len(names) + 1):
        chosen = names[:count]
        found = by_path(pair_of.model, CORRUPT, *(nsp.patch(f"{name}[1] @ 3,6", donor=CLEAN) for name in chosen))

        def expected(cell: dict[str, int], chosen: tuple[str, ...] = chosen) -> dict[str, float]:
            at = [cell["position"]]
            return by_hand(pair_of, CORRUPT, [Edit(name, 1, replacing(donors[name], at, None)) for name in chosen])

        assert_cells(found, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_pattern_beside_q_on_a_fresh_model(family: str) -> None:
    """The first trace of a model must not need a second one to be right."""
    found = []
    of = model(family)
    for _ in range(2):
        with of.trace(CORRUPT) as t:
            t.ablate("q[1] @ 3")
            t.scale("pattern[1][2] @ 3", 0.5)
            t.measure(nsp.logit(4))
        found.append(float(t.results["logit"]))
    edits = [
        Edit("q", 1, computing(torch.zeros_like, [3])),
        Edit("pattern", 1, computing(lambda old: old * 0.5, [3], [2])),
    ]
    np.testing.assert_allclose(found, float(both(family).reference.logits(CORRUPT, edits)[-1, 4]), **CLOSE)


# Directions, positions of metrics, prompts of several lengths


def test_noising_is_denoising_with_the_prompts_exchanged(pair_of: Both) -> None:
    found = by_path(pair_of.model, CLEAN, nsp.patch("mlp_out[*] @ *", donor=CORRUPT))
    donors = donor_values(pair_of, "mlp_out", range(LAYERS), CORRUPT)

    def expected(cell: dict[str, int]) -> dict[str, float]:
        change = replacing(donors[cell["layer"]], [cell["position"]], None)
        return by_hand(pair_of, CLEAN, [Edit("mlp_out", cell["layer"], change)])

    assert_cells(found, expected)
    base, donor = found["last_base"], found["last_donor"]
    xr.testing.assert_allclose(found["effect"], (base - found["last"]) / (base - donor), atol=1e-5)


@pytest.mark.parametrize("position", [0, 3, 4, 5, 8])
def test_a_metric_before_at_and_after_the_patch(pair_of: Both, position: int) -> None:
    """One metric alone, so that a branch really ends where it is measured."""
    metrics = (nsp.logit(4, position=str(position), name="last"),)
    site = "resid_pre[*] @ 4"
    found = by_path(pair_of.model, CORRUPT, nsp.patch(site, donor=[7] * 9), metrics=metrics)
    donors = donor_values(pair_of, "resid_pre", range(LAYERS), [7] * 9)
    base = float(pair_of.reference.logits(CORRUPT)[position, 4])
    for layer in range(LAYERS):
        logits = pair_of.reference.logits(CORRUPT, [Edit("resid_pre", layer, replacing(donors[layer], [4], None))])
        value = float(logits[position, 4])
        np.testing.assert_allclose(found["last"].sel(layer=layer, position=4), [value, value], **CLOSE)
    if position < 4:
        assert (found["last"] == found["last_base"]).all()
        np.testing.assert_allclose(found["last_base"], [base, base], **CLOSE)


@pytest.mark.parametrize("tight", [False, True], ids=["", "tight"])
@pytest.mark.parametrize("name", ["resid_post", "v", "pattern", "mlp_neurons"])
def test_prompts_of_several_lengths_in_one_request(pair_of: Both, name: str, tight: bool) -> None:
    bases = [CORRUPT[:4], CORRUPT, CORRUPT[1:7], CORRUPT[:4]]
    donors = [CLEAN[:4], CLEAN, [8, 8, 8, 8, 8, 8], [1, 2, 3, 4]]
    metrics = (nsp.logit(4, name="last"), nsp.kl("base", name="kl"), nsp.logit(9, position="2", name="early"))
    sweep = nsp.patch(f"{name}[*]{'[3,9]' if name == 'mlp_neurons' else ''} @ *", donor=donors)
    found = []
    for path in PATHS:
        memory = tight_budget(pair_of, path) if tight else None
        found.append(swept(pair_of.model, bases, sweep, path=path, metrics=metrics, memory=memory))
    both_paths = xr.concat(found, "path")
    for number, (base, donor) in enumerate(zip(bases, donors, strict=True)):
        values = donor_values(pair_of, name, range(LAYERS), donor)
        plain = pair_of.reference.logits(base)[-1].log_softmax(0)
        one = both_paths.isel(prompt=number)
        assert np.isnan(one["last"].isel(position=slice(len(base), None))).all()

        def expected(
            cell: dict[str, int], base: list[int] = base, values: Any = values, plain: torch.Tensor = plain
        ) -> dict[str, float]:
            units = [cell["neuron"]] if "neuron" in cell else None
            change = replacing(values[cell["layer"]], [cell["position"]], units)
            logits = pair_of.reference.logits(base, [Edit(name, cell["layer"], change)])
            kl = float((plain.exp() * (plain - logits[-1].log_softmax(0))).sum())
            return {"last": float(logits[-1, 4]), "early": float(logits[2, 9]), "kl": kl}

        assert_cells(one.isel(position=slice(0, len(base))), expected)


@functools.cache
def tight_budget(which: Both, path: str) -> int:
    """About the smallest budget that the path accepts for a sweep of `CORRUPT`."""

    def suffices(budget: int) -> bool:
        t = which.model.trace(CORRUPT, path=path, memory=budget)
        t.sweep(nsp.scale("resid_pre[0,2] @ *", 2.0))
        t.measure(nsp.logit(4))
        try:
            t.run()
        except nsp.InputError:
            return False
        return True

    low, high = 1, 2**30
    while high - low > max(1, high // 64):
        budget = (low + high) // 2
        low, high = (low, budget) if suffices(budget) else (budget, high)
    return high


def test_long_prompts_in_rows_of_their_own(pair_of: Both) -> None:
    """Branches longer than a packed row, of prompts that differ from the first token on, beside short ones."""
    name = "max_position_embeddings" if pair_of.family == "llama" else "n_positions"
    of = model(pair_of.family, **{name: 256})
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 60, (length,), generator=generator).tolist() for length in (210, 120, 150, 12)]
    donors = [torch.randint(0, 60, (len(prompt),), generator=generator).tolist() for prompt in prompts]
    sweep = nsp.patch("resid_pre[*] @ 0,3,10,-1", donor=donors)
    metrics = (nsp.logit(4, name="last"), nsp.kl("base"), nsp.logit(9, position="10", name="early"))
    found = by_path(of, prompts, sweep, metrics=metrics)
    small = swept(of, prompts, sweep, path="branch", metrics=metrics, memory="3MB")
    hooks = reference(of)
    for name in ("last", "kl", "early"):
        branch, plain = found[name].values
        np.testing.assert_allclose(branch, plain, rtol=0, atol=1e-4)
        np.testing.assert_allclose(small[name], plain, rtol=0, atol=1e-4)
    for number, place in ((0, 3), (1, 10), (3, 0)):
        value = hooks.values(donors[number], [("resid_pre", 1)])["resid_pre", 1]
        logits = hooks.logits(prompts[number], [Edit("resid_pre", 1, replacing(value, [place], None))])
        cell = found["last"].isel(prompt=number, layer=1, position=[0, 3, 10].index(place))
        np.testing.assert_allclose(cell, [float(logits[-1, 4])] * 2, **CLOSE)


def test_every_neuron_of_every_layer_at_once(pair_of: Both) -> None:
    """Hundreds of branches of one token, side by side in wide rows."""
    sweep = nsp.patch("mlp_neurons[*][*] @ last", donor=CLEAN)
    found = by_path(pair_of.model, CORRUPT, sweep, metrics=(nsp.logit(4, name="last"),))
    assert found["last"].shape == (2, LAYERS, 1, NEURONS)
    donors = donor_values(pair_of, "mlp_neurons", range(LAYERS))
    for layer, neuron in itertools.product(range(LAYERS), range(0, NEURONS, 7)):
        edit = Edit("mlp_neurons", layer, replacing(donors[layer], [8], [neuron]))
        exact = float(pair_of.reference.logits(CORRUPT, [edit])[-1, 4])
        np.testing.assert_allclose(found["last"].sel(layer=layer, neuron=neuron)[:, 0], [exact, exact], **CLOSE)


# Other operations


VECTOR = torch.linspace(-2, 2, 32)
HEAD = torch.linspace(-2, 2, 8)
OPERATIONS: list[tuple[str, Any, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("scale", lambda site, _v: nsp.scale(site, -0.5), lambda old: old * -0.5),
    ("zero", lambda site, _v: nsp.ablate(site), torch.zeros_like),
    ("add", lambda site, v: nsp.inject(site, v, coefficient=0.7), lambda old: old + 0.7 * _like(old)),
    ("set", lambda site, v: nsp.inject(site, v, mode="set"), lambda old: _like(old).expand_as(old)),
    ("apply", lambda site, _v: nsp.apply(site, torch.sin), torch.sin),
]


def _like(old: torch.Tensor) -> torch.Tensor:
    return (HEAD if old.shape[-1] == 8 else VECTOR).double() if old.shape[-1] > 1 else torch.tensor([0.9]).double()


@pytest.mark.parametrize(("operation", "stated", "change"), OPERATIONS, ids=[row[0] for row in OPERATIONS])
@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "k", "z", "mlp_neurons"])
def test_operations_without_a_donor(
    pair_of: Both, name: str, operation: str, stated: Any, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    unit = {"k": "head", "z": "head", "mlp_neurons": "neuron"}.get(name)
    vector = {"head": HEAD, "neuron": torch.tensor([0.9]), None: VECTOR}[unit]
    site = f"{name}[*]{'[1]' if unit else ''} @ 1,4,8"
    found = by_path(pair_of.model, CORRUPT, stated(site, vector), metrics=METRICS)

    def expected(cell: dict[str, int]) -> dict[str, float]:
        units = None if unit is None else [1]
        return by_hand(pair_of, CORRUPT, [Edit(name, cell["layer"], computing(change, [cell["position"]], units))])

    assert_cells(found.squeeze(unit) if unit else found, expected)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_the_pattern_is_scaled_head_by_head(pair_of: Both, factor: float) -> None:
    found = by_path(pair_of.model, CORRUPT, nsp.scale("pattern[*][*] @ 4,8", factor))

    def expected(cell: dict[str, int]) -> dict[str, float]:
        change = computing(lambda old: old * factor, [cell["position"]], [cell["head"]])
        return by_hand(pair_of, CORRUPT, [Edit("pattern", cell["layer"], change)])

    assert_cells(found, expected)


def test_only_a_pattern_of_the_same_length_can_be_patched(pair_of: Both) -> None:
    """The key axis of a pattern has no pairing where prompts differ in length, whatever the query is called."""
    t = pair_of.model.trace(CORRUPT)
    t.patch("pattern[1] @ last", donor=CLEAN[:6])
    t.measure(nsp.logit(4))
    with pytest.raises(nsp.InputError, match="pattern"):
        t.run()


# Numbers in half precision, other seeds and shapes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_dtypes(family: str, dtype: torch.dtype) -> None:
    """Paths round differently in half precision; each stays as near to exact numbers as an ordinary forward pass."""
    of = model(family, dtype=dtype)
    hooks = reference(of)
    plain = of.module(torch.tensor([CORRUPT])).logits[0, -1].double()
    noise = float((plain - hooks.logits(CORRUPT)[-1]).abs().max())
    for name in ("resid_post", "z", "k", "mlp_up"):
        found = {path: swept(of, CORRUPT, nsp.patch(f"{name}[*] @ *", donor=CLEAN), path=path) for path in PATHS}
        donors = hooks.values(CLEAN, [(name, layer) for layer in range(LAYERS)])
        worst = dict.fromkeys(PATHS, 0.0)
        for layer, position in itertools.product(range(LAYERS), range(len(CORRUPT))):
            change = replacing(donors[name, layer], [position], None)
            value = float(hooks.logits(CORRUPT, [Edit(name, layer, change)])[-1, 4])
            for path in PATHS:
                cell = float(found[path]["last"].sel(layer=layer, position=position))
                worst[path] = max(worst[path], abs(cell - value))
        allowed = 4 * noise + 1e-6
        assert max(worst.values()) <= allowed, (worst, noise)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"head_dim": 12, "num_hidden_layers": 1},
        {"num_hidden_layers": 5, "intermediate_size": 20, "attention_bias": False},
    ],
)
def test_other_shapes_of_llama(options: dict[str, Any], seed: int) -> None:
    of = model("llama", seed, **options)
    hooks = reference(of)
    layers = of.geometry.n_layers
    for name in ("q", "v", "z", "mlp_out"):
        found = {path: swept(of, CORRUPT, nsp.patch(f"{name}[*] @ 2:9", donor=CLEAN), path=path) for path in PATHS}
        donors = hooks.values(CLEAN, [(name, layer) for layer in range(layers)])
        for layer, position in itertools.product(range(layers), (2, 5, 8)):
            logits = hooks.logits(CORRUPT, [Edit(name, layer, replacing(donors[name, layer], [position], None))])
            for path in PATHS:
                cell = found[path]["last"].sel(layer=layer, position=position)
                np.testing.assert_allclose(cell, float(logits[-1, 4]), **CLOSE)


def test_resid_mid_is_set_exactly() -> None:
    """What the MLP receives is the value written, without the rounding of a sum, which its norm would amplify."""
    of = model("llama", dtype=torch.bfloat16)
    hooks = reference(of)
    noise = float((of.module(torch.tensor([CORRUPT])).logits[0, -1].double() - hooks.logits(CORRUPT)[-1]).abs().max())
    for path in PATHS:
        found = swept(of, CORRUPT, nsp.scale("resid_mid[*] @ *", 0.0), path=path, axes=("layer",))
        for layer in range(LAYERS):
            logits = hooks.logits(CORRUPT, [Edit("resid_mid", layer, computing(torch.zeros_like))])
            assert abs(float(found["last"].sel(layer=layer)) - float(logits[-1, 4])) < 4 * noise


# Memory


def _note(passes: list[tuple[int, int]], done: int, total: int) -> None:
    passes.append((done, total))


def test_a_tight_budget_splits_the_sweep_and_changes_no_number(pair_of: Both) -> None:
    sweep = nsp.patch("z[*][*] @ *", donor=[7] * 9)
    for path in PATHS:
        free = swept(pair_of.model, CORRUPT, sweep, path=path)
        passes: list[tuple[int, int]] = []
        note = functools.partial(_note, passes)
        with pair_of.model.trace(CORRUPT, path=path, memory=tight_budget(pair_of, path), progress=note) as t:
            t.sweep(sweep)
            t.measure(*METRICS)
        assert len(passes) > 3
        assert passes == sorted(passes)
        assert passes[-1][0] == passes[-1][1]
        for name in ("last", "middle", "early", "kl"):
            np.testing.assert_allclose(t.results[name], free[name], atol=2e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("memory", [1, 1000, "1KB"])
def test_a_budget_that_is_too_small_is_refused(pair_of: Both, path: str, memory: str | int) -> None:
    t = pair_of.model.trace(CORRUPT, path=path, memory=memory)
    t.sweep(nsp.patch("resid_post[*] @ *", donor=CLEAN))
    t.measure(nsp.logit(4))
    with pytest.raises(nsp.InputError, match="memory"):
        t.run()


@pytest.mark.parametrize("memory", ["lots", "4 gigs", "-1GB", "1.2.3MB", -5, 0])
def test_a_budget_that_is_no_size_is_refused(memory: str | int) -> None:
    t = both("llama").model.trace(CORRUPT, memory=memory)
    t.sweep(nsp.scale("resid_post[*] @ *", 2.0))
    t.measure(nsp.logit(4))
    with pytest.raises(nsp.InputError, match="memory"):
        t.run()


# Which path runs


def test_a_model_whose_branch_path_is_wrong_falls_back_with_a_warning() -> None:
    """A layer that counts the rows of its batch: right in an ordinary forward pass, different in a packed one."""
    of = model("llama")

    def crowd(_module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        past = kwargs["past_key_values"]
        shifted = hidden + (0.5 if past is not None and past.get_seq_length(0) else 0.0)
        return ((shifted, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": shifted})

    def stated(path: Literal["auto", "branch"]) -> nsp.Trace:
        t = of.trace(CORRUPT, path=path)
        t.sweep(nsp.patch("resid_post[*] @ *", donor=CLEAN))
        t.measure(nsp.logit(4))
        return t

    of.module.model.layers[1].self_attn.register_forward_pre_hook(crowd, with_kwargs=True)
    t = stated("auto")
    with pytest.warns(RuntimeWarning, match="plain path"):
        t.run()
    assert t.receipts[0].path == "plain"
    assert "self-check" in t.receipts[0].reason
    refused = stated("branch")
    with pytest.raises(nsp.InputError, match="self-check"):
        refused.run()


def test_the_check_runs_once_and_keeps_quiet_where_all_is_well(recwarn: pytest.WarningsRecorder) -> None:
    of = model("llama", 3)
    for _ in range(2):
        swept(of, CORRUPT, nsp.patch("resid_post[*] @ *", donor=CLEAN), path="branch")
    assert of.runtime.branch_checked
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
