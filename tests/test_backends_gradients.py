"""Backward passes on a server that has no nsp, and what its block must do that a local trace need not."""

from __future__ import annotations

from pathlib import Path

import engine_models as tiny
import numpy as np
import pytest
import torch
from engine_models import one_thread  # noqa: F401
from ndif_server import Double, checkpoint
from tiny_architectures import tiny_model

import nsp
from nsp.datasets.prompts import Prompt
from nsp.engine.donors import Donor
from nsp.engine.gradients import Objective, gradients
from nsp.engine.propagation_rules import RELP
from nsp.errors import InputError
from nsp.experiments.attribution.scores import Scored, edge_scores, node_scores
from nsp.sites import Site

BASE, OTHER = Prompt.from_ids(tiny.CLEAN), Prompt.from_ids(tiny.CORRUPT)
METHODS = ("atp", "relp", "grad_x_act", "atp_ig", "eap_ig")
COMPONENTS = ("mlp_neurons @ *", "z @ 2", "resid_mid", "resid_post", "embed", "mlp_up")


def remote(weights: Path, double: Double) -> nsp.Model:
    return nsp.load(weights, dtype="float32", backend={"kind": "ndif", "host": double.address, "model": str(weights)})


def scored(donor: Donor) -> Scored:
    return Scored(BASE, Objective("logit_diff", torch.tensor([[4, 9]]), (len(BASE) - 1,)), donor, 2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_the_local_ones_and_one_job_each(family: str, double: Double, tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / family, family)
    here, there = nsp.load(weights, device="cpu", dtype="float32"), remote(weights, double)
    end = Donor("mean", (OTHER, Prompt.from_ids([3, 1, *tiny.CORRUPT])), over="end")
    for number, method in enumerate(METHODS):
        for component in COMPONENTS:
            if method == "atp_ig" and component == "resid_mid":
                continue
            of, site = scored((Donor("counterfactual", prompts=(OTHER,)), end)[number % 2]), Site.parse(component)
            found = node_scores(there.engine, of, site, method)
            np.testing.assert_allclose(found, node_scores(here.engine, of, site, method), atol=1e-6)
            assert np.abs(found).max() > 0
    there.jobs()
    np.testing.assert_allclose(
        edge_scores(there.engine, scored(end)), edge_scores(here.engine, scored(end)), atol=1e-6
    )
    jobs = there.jobs()
    # The mean of the reference prompts, and everything else; scores alone come back.
    assert len(jobs) <= 4
    assert all(job["received"] < 30_000 for job in jobs)


def test_a_pattern_has_a_gradient_there(double: Double, tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "llama")
    here, there = nsp.load(weights, device="cpu", dtype="float32"), remote(weights, double)
    slots = [("pattern", 0), ("pattern", 1), ("z", 1)]
    of = scored(Donor()).objective
    found, expected = (gradients(one.runtime, [BASE.token_ids], slots, of) for one in (there, here))
    for slot in slots:
        assert found.gradients[slot].shape == expected.gradients[slot].shape
        torch.testing.assert_close(found.gradients[slot].cpu() + 0, expected.gradients[slot])
    assert float(expected.gradients["pattern", 0].abs().max()) > 0


def test_no_gradient_pass_of_a_pattern_in_between(double: Double, tmp_path: Path) -> None:
    there = remote(checkpoint(tmp_path / "llama"), double)
    with pytest.raises(InputError, match="cannot be interpolated"):
        node_scores(there.engine, scored(Donor()), Site.parse("pattern @ last"), "atp_ig")


@pytest.mark.parametrize("backend", ["local-sim", "ndif"])
def test_masks_by_kind_of_attention(backend: str, double: Double, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    tiny_model("gemma2").save_pretrained(weights)
    tiny.tokenizer().save_pretrained(weights)
    here = nsp.load(weights, device="cpu", dtype="float32")
    there = (
        remote(weights, double)
        if backend == "ndif"
        else nsp.load(weights, device="cpu", dtype="float32", backend=backend)
    )
    found = []
    for model in (here, there):
        with model.trace(tiny.text([5, 6, 7, 8, 9, 10, 11, 12])) as t:
            t.sweep(nsp.patch("resid_post[*] @ *", donor=tiny.text([5, 6, 7, 8, 20, 10, 21, 12])))
            t.measure(nsp.logit_diff("w7", "w9"))
        assert t.receipts[0].path == "branch"
        found.append(t.results["logit_diff"].values)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_the_order_of_modules_is_asked_of_the_server(double: Double, tmp_path: Path) -> None:
    # GPT-2's forward asks for a number, so its outline cannot run here.
    weights = checkpoint(tmp_path / "gpt2", "gpt2")
    here, there = nsp.load(weights, device="cpu", dtype="float32"), remote(weights, double)
    assert there.runtime.watched().tolist() == here.runtime.watched().tolist()
    of = scored(Donor()).objective
    site = ("module:transformer.h.1.ln_2", 1)
    found, expected = (gradients(one.runtime, [BASE.token_ids], [site], of, rules=RELP) for one in (there, here))
    torch.testing.assert_close(found.gradients[site].cpu() + 0, expected.gradients[site])
