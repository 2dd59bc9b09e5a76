"""A plan is plain data: it prints, hashes, round-trips through JSON and YAML, and runs again to the same numbers."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, WIDTH, both, model, one_thread, text  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as some
from rich.console import Console
from ruamel.yaml import YAML

import nsp
from nsp.interventions import from_dict, to_dict
from nsp.metrics import METRICS, Metric


def llama() -> nsp.Model:
    return both("llama").model


def by_json(data: Any) -> Any:
    return json.loads(json.dumps(data))


def by_yaml(data: Any) -> Any:
    yaml = YAML(typ="safe")
    stream = io.StringIO()
    yaml.dump(data, stream)
    return yaml.load(stream.getvalue())


@functools.cache
def recording() -> xr.DataArray:
    with llama().trace(CLEAN) as t:
        t.record("z[0,1][1,3] @ 2:7")
    return t.results["z"]


def negated(value: torch.Tensor) -> torch.Tensor:
    return -value


def plainly(t: nsp.Trace) -> None:
    t.measure(nsp.logit(4))


BASE, LOGIT = text(CORRUPT), nsp.logit(4)
SWEPT = nsp.patch("resid_post[*] @ *", donor=CLEAN)
TRACES: dict[str, tuple[Any, dict[str, Any], Callable[[nsp.Trace], None]]] = {
    "nothing": (CORRUPT, {}, plainly),
    "text": (text(CORRUPT), {}, lambda t: t.patch("z[1] @ 3", donor=text(CLEAN))),
    "spans": (
        text(CORRUPT),
        {"spans": {"who": "w40 w12", "what": "w50"}},
        lambda t: t.patch("z[1] @ who,what", donor=text(CLEAN)),
    ),
    "spans elsewhere": (
        text([1, 40, 2, 3]),
        {"spans": {"who": "w40"}},
        lambda t: t.patch("z[1] @ who", donor=text([1, 2, 3, 40, 5])),
    ),
    "batch": ([CORRUPT, CORRUPT[:4]], {}, lambda t: t.patch("k[1] @ 2", donor=[CLEAN, CLEAN[:4]])),
    "batch of one": ([CORRUPT], {}, lambda t: t.patch("v[1] @ 2", donor=CLEAN)),
    "one donor for all": ([CORRUPT, CLEAN], {}, lambda t: t.patch("q[1] @ 2", donor=torch.tensor([CLEAN]))),
    "encoded donor": (text(CORRUPT), {}, lambda t: t.patch("z[1] @ 3", donor=llama().encode(text(CLEAN)))),
    "sweep": (CORRUPT, {"path": "branch"}, lambda t: (t.sweep(SWEPT), plainly(t))),
    "sweep of an axis": (CORRUPT, {}, lambda t: (t.sweep(SWEPT, axes=["layer"]), t.measure(nsp.kl()))),
    "sweep and fixed": (CORRUPT, {}, lambda t: (t.sweep(SWEPT), t.scale("k[1] @ 3", 1e-5), plainly(t))),
    "several": (CORRUPT, {}, lambda t: (t.sweep(SWEPT, nsp.scale("z[*] @ *", 0.3)), plainly(t))),
    "inject": (CORRUPT, {}, lambda t: t.inject("mlp_out[1]", torch.linspace(0, 1 / 3, WIDTH), coefficient=-0.1)),
    "inject rows": (CORRUPT, {}, lambda t: t.inject("mlp_out[1] @ 1,2", torch.rand(2, WIDTH), mode="set")),
    "noise": (CORRUPT, {}, lambda t: t.inject("embed @ 2:5", nsp.Noise(2.5, seed=9))),
    "zero": (CORRUPT, {}, lambda t: t.ablate("mlp_neurons[1][3,9] @ -1")),
    "mean": (CORRUPT, {}, lambda t: t.ablate("z[1]", "mean", reference=[CLEAN, text(CORRUPT)])),
    "resample": (CORRUPT, {}, lambda t: t.ablate("z[1]", "resample", reference=[CLEAN], over="prompts", seed=3)),
    "gaussian": (CORRUPT, {}, lambda t: t.ablate("z[1][2] @ 1:8:2", "noise", scale=0.7, seed=4)),
    "apply": (CORRUPT, {}, lambda t: t.apply("module:model.layers.1.mlp.up_proj @ 4", negated)),
    "tensor": (CORRUPT, {}, lambda t: t.patch("resid_post[1] @ 2", donor=torch.rand(WIDTH))),
    "recording": (CORRUPT, {}, lambda t: t.patch("z[0,1][3] @ 4,2", donor=recording())),
    "records": (CORRUPT, {}, lambda t: t.record("z[1][0,2] @ 1:4", "pattern[0]", "logits @ last")),
    "metrics": (CORRUPT, {}, lambda t: t.measure(Metric("kl", reference="base", position="3", name="mine"))),
    "numpy numbers": (
        np.array(CORRUPT),
        {},
        lambda t: (t.scale("z[1] @ 3", np.float32(0.5)), t.measure(nsp.logit(np.int64(4)))),  # type: ignore[arg-type]
    ),
}


def traced(name: str) -> nsp.Trace:
    prompt, options, state = TRACES[name]
    t = llama().trace(prompt, **options)
    state(t)
    return t


@pytest.mark.parametrize("through", [by_json, by_yaml], ids=["json", "yaml"])
@pytest.mark.parametrize("name", TRACES)
def test_a_plan_comes_back_from_plain_data(name: str, through: Callable[[Any], Any]) -> None:
    plan = traced(name).plan
    again = nsp.Plan.from_dict(through(plan.to_dict()))
    assert again.hash == plan.hash
    assert again == nsp.Plan.from_dict(plan.to_dict())
    assert by_json(again.to_dict()) == by_json(plan.to_dict())
    assert len({plan, again}) == 1


@pytest.mark.parametrize("name", TRACES)
def test_rerunning_a_plan_gives_the_same_results(name: str) -> None:
    t = traced(name)
    t.run()
    again = llama().rerun(nsp.Plan.from_dict(by_json(t.plan.to_dict())))
    assert again.plan.hash == t.plan.hash
    xr.testing.assert_identical(again.results, t.results)
    assert again.receipts == t.receipts


def test_what_changes_a_number_changes_the_hash() -> None:
    """Each of these differs from all others in one thing only."""

    def plan(prompt: Any = BASE, metric: Metric = LOGIT, spans: Any = None, path: Any = "auto", **kwargs: Any) -> str:
        t = kwargs.pop("of", llama()).trace(prompt, spans=spans, path=path)
        if "sweep" in kwargs:
            t.sweep(kwargs["sweep"], axes=kwargs.get("axes"))
        t.add(*kwargs.get("fixed", ()))
        t.record(*kwargs.get("record", ()))
        t.measure(metric)
        return t.plan.hash

    site = "resid_post[1] @ it"
    vector = torch.zeros(WIDTH)
    nudged = vector.clone()
    nudged[3] = 1e-30
    plans = [
        plan(),
        plan(text(CLEAN)),
        plan([text(CORRUPT)]),
        plan(metric=nsp.logit(5)),
        plan(metric=nsp.logit(4, position="3")),
        plan(metric=nsp.logit(4, name="x")),
        plan(metric=nsp.prob(4)),
        plan(metric=nsp.kl("base")),
        plan(metric=nsp.kl("donor")),
        plan(path="plain"),
        plan(record=["z[1]"]),
        plan(fixed=[nsp.scale(site, 0.0)], spans={"it": "w40"}),
        plan(fixed=[nsp.scale(site, 0.0)], spans={"it": "w12"}),
        plan(fixed=[nsp.patch(site, donor=text([2, 1, 40]))], spans={"it": "w40"}),
        plan(fixed=[nsp.patch(site, donor=text([1, 2, 40]))], spans={"it": "w40"}),
        plan(fixed=[nsp.scale("resid_post[1] @ 4", 0.0)]),
        plan(fixed=[nsp.scale("resid_post[1] @ 4", 0.1)]),
        plan(fixed=[nsp.ablate("resid_post[1] @ 4")]),
        plan(fixed=[nsp.ablate("resid_post[1] @ 4", "mean")]),
        plan(fixed=[nsp.ablate("resid_post[1] @ 4", "mean", reference=[CLEAN])]),
        plan(fixed=[nsp.ablate("resid_post[1] @ 4", "mean", reference=[CLEAN], over="prompts")]),
        plan(fixed=[nsp.ablate("resid_post[1] @ 4", "noise")]),
        plan(fixed=[nsp.ablate("resid_post[1] @ 4", "noise", seed=1)]),
        plan(fixed=[nsp.ablate("resid_post[1] @ 4", "noise", scale=2.0)]),
        plan(fixed=[nsp.inject("resid_post[1] @ 4", vector)]),
        plan(fixed=[nsp.inject("resid_post[1] @ 4", nudged)]),
        plan(fixed=[nsp.inject("resid_post[1] @ 4", vector, mode="set")]),
        plan(fixed=[nsp.inject("resid_post[1] @ 4", nsp.Noise(1.0))]),
        plan(fixed=[nsp.apply("resid_post[1] @ 4", torch.sin)]),
        plan(fixed=[nsp.apply("resid_post[1] @ 4", torch.cos)]),
        plan(fixed=[nsp.apply("resid_post[1] @ 4", lambda x: x * 2)]),
        plan(fixed=[nsp.apply("resid_post[1] @ 4", lambda x: x * 3)]),
        plan(sweep=nsp.scale("z[*] @ *", 0.0)),
        plan(sweep=nsp.scale("z[*] @ *", 0.0), axes=("layer",)),
        plan(sweep=nsp.scale("z[*][*] @ *", 0.0)),
        plan(of=model("llama", 1)),
        plan(of=model("llama", dtype=torch.float64)),
    ]
    assert len(set(plans)) == len(plans)


def hash_with(function: Any) -> str:
    t = llama().trace(CORRUPT)
    t.apply("z[1] @ 3", function)
    return t.plan.hash


def test_a_function_that_closes_over_a_value_is_known_by_it() -> None:
    def closure(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda value: value * factor

    def over_a_tensor(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
        direction = torch.zeros(5000)
        direction[2500] = factor
        return lambda value: value * direction.sum()

    def partial(factor: float) -> Any:
        return functools.partial(torch.mul, factor)

    def layer(factor: float) -> Any:
        made = torch.nn.Linear(8, 8)
        with torch.no_grad():
            made.weight.fill_(factor)
            made.bias.fill_(0.0)
        return made

    for of in (closure, over_a_tensor, partial, layer):
        assert hash_with(of(2.0)) != hash_with(of(3.0)), of.__name__
        assert hash_with(of(2.0)) == hash_with(of(2.0)), of.__name__


def test_a_function_is_known_by_its_code_and_not_by_its_address() -> None:
    source = "lambda value: value * sum(factor for factor in (1, {}))"
    one, same, other = (eval(source.format(factor), {}) for factor in (2, 2, 3))
    assert hash_with(one) == hash_with(same)
    assert hash_with(one) != hash_with(other)


@pytest.mark.parametrize(
    "function",
    [torch.sin, functools.partial(torch.clamp, min=0), torch.nn.ReLU(), lambda x: x, torch.Tensor.abs],
    ids=["builtin", "partial", "module", "lambda", "method"],
)
def test_any_function_runs_and_a_plan_without_its_name_says_that_it_cannot_be_repeated(function: Any) -> None:
    with llama().trace(CORRUPT) as t:
        t.apply("z[1] @ 3", function)
        t.measure(nsp.logit(4))
    plan = nsp.Plan.from_dict(by_json(t.plan.to_dict()))
    assert plan.hash == t.plan.hash
    try:
        again = llama().rerun(plan)
    except nsp.InputError as error:
        assert "function" in str(error)  # noqa: PT017 (either outcome is right; a wrong number or a traceback is not)
    else:
        xr.testing.assert_identical(again.results, t.results)


def test_a_run_knows_nothing_of_the_machine() -> None:
    plan = traced("sweep").plan
    shown = json.dumps(plan.to_dict())
    assert "cpu" not in shown
    assert plan.hash == traced("sweep").plan.hash


def test_a_plan_of_another_kind_is_not_rerun() -> None:
    with pytest.raises(nsp.InputError, match="nsp run"):
        llama().rerun(nsp.Plan("activation-patching", {}, {}))


def test_a_plan_is_rerun_on_its_own_model_only() -> None:
    """Other weights under the same statement are another experiment: at the least, a warning says so."""
    plan = traced("sweep").plan
    with pytest.warns(UserWarning, match="weights|model"):
        model("llama", 5).rerun(plan)


# What it prints


def test_a_dry_run_tells_the_cost_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    t = traced("sweep")
    plain = traced("sweep")
    with plain:
        pass
    executed: list[Any] = []
    from nsp.engine.runtime import Runtime

    monkeypatch.setattr(Runtime, "execute", lambda _self, program: executed.append(program))
    plan = t.dry_run()
    assert executed == []
    assert plan.hash == plain.plan.hash
    assert plan.schedule is not None
    (cost,) = plan.schedule.estimates
    receipt = plain.receipts[0]
    assert (cost.path, cost.branches, cost.pruned) == (receipt.path, receipt.branches, receipt.unchanged)
    assert cost.passes >= 1
    assert 0 < cost.token_layers < cost.naive_token_layers
    assert cost.seconds > 0
    assert cost.bytes > 0
    for width in (60, 160):
        console = Console(width=width, file=io.StringIO())
        console.print(plan.describe(width))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert plan.hash[:12] in shown
        assert f"{cost.branches}" in shown
        assert "resid_post" in shown
    assert "resid_post[*] @ *" in str(plan)


@pytest.mark.parametrize("path", ["branch", "plain"])
def test_a_dry_run_counts_the_passes_that_the_run_takes(path: Any) -> None:
    for name in ("z[*][*] @ *", "mlp_neurons[*] @ *", "resid_post[*] @ last"):
        passes: list[tuple[int, int]] = []
        note = functools.partial(lambda seen, *done: seen.append(done), passes)
        t = llama().trace([CORRUPT, CORRUPT[:5]], path=path, memory="300KB", progress=note)
        t.sweep(nsp.scale(name, 0.0))
        t.measure(nsp.logit(4))
        schedule = t.dry_run().schedule
        assert schedule is not None
        t.run()
        assert schedule.estimates[0].passes == len(passes)
        assert schedule.estimates[0].branches == passes[-1][1]


# Interventions and metrics as data


SITES = some.sampled_from(["resid_post[1] @ 2", "z[*][1] @ *", "mlp_neurons[0:2][5,7] @ -1", "embed @ last", "k[1]"])
FINITE = some.floats(-1e6, 1e6)
SEEDS = some.integers(0, 2**31)
PROMPTS = some.lists(some.integers(0, 60), min_size=1, max_size=4) | some.text("ab ", min_size=1, max_size=5)


@some.composite
def interventions(draw: some.DrawFn) -> Any:
    site = draw(SITES)
    kind = draw(some.sampled_from(["patch", "inject", "noise", "ablate", "scale"]))
    if kind == "patch":
        return nsp.patch(site, donor=draw(PROMPTS))
    if kind == "inject":
        vector = draw(some.lists(some.floats(-10, 10, width=32), min_size=1, max_size=4))
        return nsp.inject(site, vector, mode=draw(some.sampled_from(["add", "set"])), coefficient=draw(FINITE))
    if kind == "noise":
        return nsp.inject(site, nsp.Noise(draw(FINITE), draw(SEEDS)))
    if kind == "scale":
        return nsp.scale(site, draw(FINITE))
    return nsp.ablate(
        site,
        draw(some.sampled_from(["zero", "mean", "resample", "noise"])),
        reference=draw(some.none() | some.lists(PROMPTS, min_size=1, max_size=2)),
        over=draw(some.sampled_from(["tokens", "prompts"])),
        scale=draw(FINITE),
        seed=draw(SEEDS),
    )


@given(interventions())
@settings(deadline=None, max_examples=150)
def test_every_intervention_comes_back_from_plain_data(intervention: Any) -> None:
    data = to_dict(intervention)
    for through in (by_json, by_yaml):
        assert to_dict(from_dict(through(data))) == data


@pytest.mark.parametrize("kind", METRICS)
def test_every_metric_comes_back_from_plain_data(kind: str) -> None:
    tokens = (" Mary", 4)[: METRICS[kind].tokens]
    setting = {"direction": {"direction": (0.5, -1.0), "layer": 2}, "function": {"function": "mine:loss"}}
    position = "last" if METRICS[kind].several else "3"
    metric = Metric(kind, tokens, "base", position, "mine", **setting.get(METRICS[kind].setting, {}))
    assert Metric.from_dict(by_json(metric.to_dict())) == metric
    assert Metric.from_dict(by_yaml(metric.to_dict())) == metric


def test_a_damaged_plan_is_refused() -> None:
    data = to_dict(nsp.scale("z[1]", 0.0))
    with pytest.raises(nsp.InputError, match="unknown intervention 'patsh'"):
        from_dict({**data, "op": "patsh"})
    lost = {"op": "apply", "site": "z[1]", "function": {"name": "nsp.nowhere:gone", "digest": None}}
    with pytest.raises(nsp.InputError, match=r"nsp\.nowhere:gone"):
        from_dict(lost)
