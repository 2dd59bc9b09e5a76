"""One pass for bases, donors and branches gives what separate passes give, and runs only where it is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_architectures
import torch
import xarray as xr
from engine_models import CLEAN, CORRUPT, model, one_thread, text  # noqa: F401

import nsp
from nsp.engine import shared_pass
from nsp.engine.measured import Measured
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.selfcheck import ensure_checked

# A second pair, longer than the first and different from its second token on.
LONG_CLEAN, LONG_CORRUPT = [5, 11, 23, 7, 40, 31, 3, 58, 19, 20, 21, 22], [5, 12, 50, 9, 7, 3, 40, 12, 33, 6, 44, 8]


@pytest.fixture(autouse=True)
def at_any_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models read their weights for nothing, so that one pass is seldom worth while on them."""
    monkeypatch.setattr(shared_pass, "worthwhile", lambda *_: True)


@contextmanager
def counted(runtime: Runtime) -> Iterator[list[int]]:
    """The number of rows of each program that runs."""
    rows: list[int] = []
    execute = runtime.execute

    def counting(program: Any) -> Any:
        rows.append(program["batch"])
        return execute(program)

    runtime.execute = counting  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        del runtime.execute


def swept(of: nsp.Model, site: str, joined: bool, *, metrics: tuple[Any, ...] = (), **options: Any) -> tuple[xr.Dataset, int]:
    runtime = of.runtime
    ensure_checked(runtime)
    before, runtime.shares_pass = runtime.shares_pass, joined and runtime.shares_pass
    try:
        with counted(runtime) as rows, of.trace([text(CORRUPT), text(LONG_CORRUPT)], **options) as t:
            t.sweep(nsp.patch(site, donor=[text(CLEAN), text(LONG_CLEAN)]), axes=("layer", "position"))
            t.measure(nsp.logit_diff("w7", "w9"), *metrics)
        return t.results, len(rows)
    finally:
        runtime.shares_pass = before


def measured(of: nsp.Model, request: Request, memory: str | None = None) -> Measured:
    return of.engine.within(memory).measure(of.engine.plan(request))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "k", "v", "mlp_neurons", "embed"])
def test_one_pass_gives_what_separate_passes_give(family: str, site: str) -> None:
    of = model(family)
    aligned = f"{site} @ 0,1,2,3"
    together, passes = swept(of, aligned, True)
    apart, before = swept(of, aligned, False)
    assert passes == 1
    assert before > 1
    assert together.attrs["path"] == "branch"
    for name in apart.data_vars:
        np.testing.assert_allclose(together[name], apart[name], atol=2e-5, rtol=1e-5, err_msg=str(name))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out", "z"])
def test_a_donor_that_nothing_measures_is_whole(family: str, site: str) -> None:
    """The last layer's MLP runs where it is measured; a patch of what it writes reads it elsewhere too."""
    of = model(family)
    ensure_checked(of.runtime)
    prompts = [of.encode(text(ids)) for ids in (CORRUPT, LONG_CORRUPT, CLEAN, LONG_CLEAN)]
    request = Request(
        bases=tuple(prompts[:2]),
        swept=(nsp.patch(f"{site} @ last", donor=tuple(prompts[2:])),),
        axes=("layer", "position"),
        metrics=(nsp.logit_diff("w7", "w9"),),
        tokens=(torch.tensor([[7, 9], [7, 9]]),),
    )
    with counted(of.runtime) as rows:
        together = measured(of, request)
    assert len(rows) == 1
    plain = measured(of, replace(request, path="plain"))
    np.testing.assert_allclose(together.values[0], plain.values[0], atol=2e-5)
    assert together.reference is None


def test_what_needs_a_run_before_takes_one() -> None:
    """A distance needs the donor's whole distribution before the branches are measured."""
    of = model("llama")
    kl = (nsp.kl(reference="base"),)
    results, passes = swept(of, "resid_post @ 0,1,2,3", True, metrics=kl)
    assert passes > 1
    apart, _ = swept(of, "resid_post @ 0,1,2,3", False, metrics=kl)
    xr.testing.assert_equal(results, apart)


def test_what_exceeds_the_budget_takes_more_passes() -> None:
    of = model("llama")
    results, passes = swept(of, "resid_post @ 0,1,2,3", True, memory="60KB")
    assert passes > 1
    together, _ = swept(of, "resid_post @ 0,1,2,3", True)
    np.testing.assert_allclose(results["logit_diff"], together["logit_diff"], atol=2e-5)


def donors_of(of: nsp.Model, length: int) -> Request:
    """A sweep of last tokens with donors of some length: its pieces are one column wide."""
    base, donor = of.encode(text(CORRUPT)), of.encode(text([5 + at % 40 for at in range(length)]))
    return Request(
        bases=(base,),
        swept=(nsp.patch("attn_out[*] @ last", donor=donor),),
        axes=("layer",),
        metrics=(nsp.logit_diff("w7", "w9"),),
        tokens=(torch.tensor([[7, 9]]),),
    )


def test_long_donors_in_narrow_pieces_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece a token would copy the keys and values of the whole prompt for each."""
    of = model("llama")
    ensure_checked(of.runtime)
    request = donors_of(of, 60)
    dear = measured(of, request)
    monkeypatch.undo()
    with counted(of.runtime) as rows:
        cheap = measured(of, request)
    assert len(rows) == 2
    np.testing.assert_allclose(cheap.values[0], dear.values[0], atol=2e-5)


def test_a_long_past_counts_against_the_budget() -> None:
    of = model("llama")
    ensure_checked(of.runtime)
    request = donors_of(of, 60)
    with counted(of.runtime) as rows:
        measured(of, request, "2MB")
    assert len(rows) == 2


def test_prompts_that_the_model_cannot_read_are_refused() -> None:
    of = model("llama")
    request = donors_of(of, 9)
    bad = replace(request.bases[0], token_ids=(*request.bases[0].token_ids[:-1], 999))
    with pytest.raises(nsp.InputError, match="999"):
        measured(of, replace(request, reference=(bad,)))


def test_a_model_that_reads_its_keys_otherwise_runs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check tries the pass on the model, and leaves it alone where the numbers differ."""
    right, _ = swept(model("llama"), "resid_post @ 0,1,2,3", True)

    def forgetful(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        past = torch.zeros_like(key_states[:, :, :1]).expand(-1, -1, self._row.shape[1], -1)
        return torch.cat([past, key_states], dim=2), torch.cat([past, value_states], dim=2)

    monkeypatch.setattr(shared_pass.PiecesCache, "update", forgetful)
    of = model("llama")
    found, passes = swept(of, "resid_post @ 0,1,2,3", True)
    assert not of.runtime.shares_pass
    assert not of.runtime.branch_refusal
    assert passes > 1
    np.testing.assert_allclose(found["logit_diff"], right["logit_diff"], atol=2e-5)


@pytest.mark.parametrize("case", sorted(tiny_architectures.CASES))
def test_every_family_with_branches_has_them_in_one_pass(case: str) -> None:
    runtime = nsp.load(tiny_architectures.tiny_model(case)).runtime
    ensure_checked(runtime)
    assert runtime.shares_pass or runtime.branch_refusal


def test_pieces_hold_every_token_once() -> None:
    runtime = model("llama").runtime
    prompts = [CLEAN, LONG_CLEAN, CORRUPT[:2]]
    for width in (1, 3, len(CLEAN), 20):
        pieces = shared_pass.Pieces.of(runtime, prompts, width)
        places = [
            tuple(np.ravel(part)[0] for part in pieces.at(np.array([number]), np.array([position])))
            for number, prompt in enumerate(prompts)
            for position in range(len(prompt))
        ]
        assert len(set(places)) == len(places) == sum(map(len, prompts))
        assert {row for row, _ in places} == set(range(pieces.rows))
