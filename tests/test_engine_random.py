"""Whatever is stated, both paths give the same numbers: random requests of several prompts, interventions and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from engine_models import HEADS, LAYERS, NEURONS, VOCABULARY, WIDTH, both, one_thread  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import nsp
from nsp.engine import shared_pass
from nsp.metrics import METRICS, Metric

UNITS = {"q": HEADS, "z": HEADS, "pattern": HEADS, "mlp_up": NEURONS, "mlp_neurons": NEURONS}
WHOLE = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "k", "v")
VECTORS = {"z": WIDTH // HEADS, "q": WIDTH // HEADS, "mlp_up": 1, "mlp_neurons": 1}
# Metrics that read logits at one position and need no setting of their own.
_PLAIN_METRICS = sorted(kind for kind, one in METRICS.items() if not one.several and not one.setting)


@dataclass(frozen=True)
class Case:
    """One request; ``statements`` are made anew for each path from (operation, site) pairs."""

    family: str
    prompts: list[list[int]]
    donors: list[list[int]]
    swept: list[tuple[str, str]]
    axes: tuple[str, ...]
    fixed: list[tuple[str, str]]
    metrics: list[Metric]


tokens = some.integers(0, VOCABULARY - 1)


@some.composite
def sites(draw: some.DrawFn, shortest: int, counts: tuple[int, int, int] | None = None) -> str:
    """A selector; ``counts`` fixes how many layers, positions and units it selects (0 units: none named)."""
    layers, places, units = counts or (draw(some.integers(1, 2)), draw(some.integers(1, 2)), draw(some.integers(0, 2)))
    name = draw(some.sampled_from(sorted(UNITS) if units else [*WHOLE, *sorted(UNITS)]))

    def chosen(size: int, count: int) -> str:
        picked = draw(some.lists(some.integers(0, size - 1), min_size=count, max_size=count, unique=True))
        return ",".join(map(str, picked))

    bracket = f"[{chosen(UNITS[name], units)}]" if units else ""
    return f"{name}[{chosen(LAYERS, layers)}]{bracket} @ {chosen(shortest, places)}"


@some.composite
def cases(draw: some.DrawFn) -> Case:
    lengths = draw(some.lists(some.integers(3, 9), min_size=1, max_size=3))
    prompts = [draw(some.lists(tokens, min_size=size, max_size=size)) for size in lengths]
    # Donors share a beginning with their prompts, as pairs do, so that pruning has something to prune.
    donors = []
    for prompt in prompts:
        keep = draw(some.integers(0, len(prompt)))
        donors.append(
            [*prompt[:keep], *draw(some.lists(tokens, min_size=len(prompt) - keep, max_size=len(prompt) - keep))]
        )
    shortest = min(lengths)
    counts = (draw(some.integers(1, 3)), draw(some.integers(1, min(3, shortest))), draw(some.integers(0, 3)))
    operations = some.sampled_from(["patch", "patch", "scale", "zero", "add", "apply"])
    swept = [(draw(operations), draw(sites(shortest, counts))) for _ in range(draw(some.integers(1, 2)))]
    fixed = [(draw(operations), draw(sites(shortest))) for _ in range(draw(some.integers(0, 2)))]
    named = ["layer", "position", *(["unit"] if counts[2] else [])]
    axes = draw(some.lists(some.sampled_from(named), min_size=1, max_size=3, unique=True))
    kinds = draw(some.lists(some.sampled_from([*_PLAIN_METRICS, "logit", "kl"]), min_size=1, max_size=3))
    metrics = [
        Metric(
            kind,
            tuple(draw(some.lists(tokens, min_size=METRICS[kind].tokens, max_size=METRICS[kind].tokens))),
            "base",
            draw(some.sampled_from(["last", *map(str, range(shortest))])),
            f"m{number}",
        )
        for number, kind in enumerate(kinds)
        if kind not in ("rank", "top1", "rank_change", "top1_change")  # a rounding error can move these by one
    ]
    family = draw(some.sampled_from(["llama", "gpt2"]))
    return Case(family, prompts, donors, swept, tuple(axes), fixed, metrics or [nsp.logit(4, name="m0")])


def made(case: Case, operation: str, selector: str) -> Any:
    site = nsp.Site.parse(selector)
    if operation == "patch":
        return nsp.patch(site, donor=case.donors)
    if operation == "scale":
        return nsp.scale(site, 1.7)
    if operation == "zero" or site.component == "pattern":
        return nsp.ablate(site)
    if operation == "apply":
        return nsp.apply(site, torch.tanh)
    width = VECTORS[site.component] if site.units is not None else width_of(case.family, site.component)
    return nsp.inject(site, torch.linspace(-1, 1, width) if width > 1 else torch.ones(1))


def width_of(family: str, component: str) -> int:
    if component in ("mlp_up", "mlp_neurons"):
        return NEURONS
    return WIDTH // 2 if component in ("k", "v") and family == "llama" else WIDTH


def outcome(case: Case, path: Any, memory: str | None = None) -> tuple[xr.Dataset, tuple[Any, ...]]:
    with both(case.family).model.trace(case.prompts, path=path, memory=memory) as t:
        t.sweep(*(made(case, *stated) for stated in case.swept), axes=case.axes)
        t.add(*(made(case, *stated) for stated in case.fixed))
        t.measure(*case.metrics)
    return t.results, t.receipts


@pytest.fixture(autouse=True, scope="module")
def in_one_pass() -> Iterator[None]:
    """Whatever fits one pass runs in one, also where that is not worth while on models as small as these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_pass, "worthwhile", lambda *_: True)
        yield


@contextmanager
def separately(case: Case) -> Iterator[None]:
    """Bases and donors run before their branches, not in one pass with them."""
    runtime = both(case.family).model.runtime
    before, runtime.shares_pass = runtime.shares_pass, False
    try:
        yield
    finally:
        runtime.shares_pass = before


def assert_paths_agree(case: Case) -> None:
    plain, plain_receipts = outcome(case, "plain")
    branch, branch_receipts = outcome(case, "branch")
    small, _ = outcome(case, "branch", "250KB")
    with separately(case):
        separate, _ = outcome(case, "branch")
    for metric in case.metrics:
        for name in (metric.name, f"{metric.name}_base"):
            assert plain[name].dims == branch[name].dims
            for found in (branch, small, separate):
                np.testing.assert_allclose(found[name], plain[name], atol=3e-4, rtol=3e-4, err_msg=f"{metric}: {case}")
    np.testing.assert_allclose(branch["change_norm"], plain["change_norm"], atol=2e-3, rtol=1e-3, err_msg=str(case))
    for one, other in zip(plain_receipts, branch_receipts, strict=True):
        assert (one.fired, one.branches, one.unchanged) == (other.fired, other.branches, other.unchanged)
        assert (one.layers, one.positions, one.rows) == (other.layers, other.positions, other.rows)


QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@given(cases())
@settings(deadline=None, max_examples=40, suppress_health_check=QUIET)
def test_both_paths_agree_on_random_requests(case: Case) -> None:
    assert_paths_agree(case)


@pytest.mark.slow
@given(cases())
@settings(deadline=None, max_examples=1500, suppress_health_check=QUIET)
def test_both_paths_agree_on_many_random_requests(case: Case) -> None:
    assert_paths_agree(case)


@given(cases())
@settings(deadline=None, max_examples=25, suppress_health_check=QUIET)
def test_a_cell_of_a_random_sweep_is_its_counterfactual_alone(case: Case) -> None:
    """The last cell of the sweep, stated as one counterfactual of each prompt: nothing pruned, packed or batched."""
    swept, _ = outcome(case, "branch")

    def last(selector: str) -> nsp.Site:
        site = nsp.Site.parse(selector)
        parts = {"layer": site.layers, "position": site.positions, "unit": site.units}
        ends = {
            axis: str(part).split(",")[-1] for axis, part in parts.items() if axis in case.axes and part is not None
        }
        return site.with_(
            layers=ends.get("layer", site.layers),
            positions=ends.get("position", site.positions),
            units=ends.get("unit", site.units),
        )

    for number, (prompt, donor) in enumerate(zip(case.prompts, case.donors, strict=True)):
        one = Case(case.family, [prompt], [donor], [], (), [], case.metrics)
        with both(case.family).model.trace([prompt]) as t:
            t.add(*(made(one, operation, str(last(selector))) for operation, selector in case.swept))
            t.add(*(made(one, *stated) for stated in case.fixed))
            t.measure(*case.metrics)
        for metric in case.metrics:
            cell = swept[metric.name].isel(prompt=number).values.reshape(-1)[-1]
            np.testing.assert_allclose(
                cell, t.results[metric.name].values[0], atol=3e-4, rtol=3e-4, err_msg=f"{metric}: {case}"
            )
