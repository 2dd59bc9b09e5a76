"""The bias scan's promises on smollm2: a noised layer and planted neurons are found, and the score is transformers' own."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import nsp
from nsp.datasets import crows
from nsp.datasets.bias_pairs import BiasPair
from nsp.experiments import pairs
from nsp.experiments.bias_scan.tables import ScanResult

LAYER = 12
CROWS = Path(__file__).parents[2] / "shared" / "data" / "crows_pairs_anonymized.csv"
# What benchmarks/crows_score.py (plain transformers, one sentence a forward pass) says of smollm2 on the whole file.
CROWS_SCORE = 55.570


def changed(smollm2: nsp.Model, columns: list[int] | None) -> nsp.Model:
    """A copy with columns of one layer's down projection replaced by others of their size; None: noise on all."""
    edited = copy.deepcopy(smollm2.module)
    weight = edited.model.layers[LAYER].mlp.down_proj.weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if columns is None:
            weight += weight.std() * torch.randn(weight.shape, generator=generator)
        else:
            weight[:, columns] = 3 * weight.std() * torch.randn((len(weight), len(columns)), generator=generator)
    return nsp.load(edited, tokenizer=smollm2.tokenizer)


def few(count: int) -> list[BiasPair]:
    return list(pairs.shipped_pairs().pairs[:count])


def plain_gap(model: nsp.Model, pair: BiasPair) -> float:
    sums = []
    for sentence in (pair.more, pair.less):
        ids = torch.tensor(
            [[model.tokenizer.bos_token_id, *model.tokenizer(sentence, add_special_tokens=False)["input_ids"]]]
        )
        with torch.no_grad():
            log_p = torch.log_softmax(model.module(ids).logits[0, :-1].double(), dim=-1)
        sums.append(float(log_p.gather(1, ids[0, 1:, None]).sum()))
    return sums[0] - sums[1]


def test_a_noised_layer_is_named_and_equal_models_have_no_star(smollm2: nsp.Model) -> None:
    tree = pairs.bias_scan(smollm2, changed(smollm2, None), few(5), components=["mlp_out"], neurons=None)
    assert [star.layer for star in ScanResult(tree).stars["mlp_out"]] == [LAYER] * 10
    same = pairs.bias_scan(smollm2, changed(smollm2, []), few(5), neurons=None)
    for component in ("mlp_out", "resid_post"):
        assert (same[f"effects/{component}"]["delta_kl"].values == 0).all()
        assert all(star.layer is None for star in ScanResult(same).stars[component])


def test_ten_planted_neurons_are_found(smollm2: nsp.Model) -> None:
    planted = [7, 100, 221, 380, 512, 700, 901, 1111, 1300, 1535]
    scan = ScanResult(pairs.bias_scan(smollm2, changed(smollm2, planted), few(5), components=["mlp_out"]))
    assert [star.layer for star in scan.stars["mlp_out"]] == [LAYER] * 10
    assert len({neuron for layer, neuron, _ in scan.found() if layer == LAYER} & set(planted)) >= 9


def test_gaps_are_those_of_plain_transformers(smollm2: nsp.Model) -> None:
    found = pairs.pair_gap(smollm2, few(6))["gap"].values
    np.testing.assert_allclose(found, [plain_gap(smollm2, pair) for pair in few(6)], atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not CROWS.is_file(), reason="CrowS-Pairs is not beside the repository")
@pytest.mark.timeout(3600)
def test_the_score_on_the_whole_of_crows_pairs(smollm2: nsp.Model) -> None:
    gaps = pairs.pair_gap(smollm2, pairs.read_bias_pairs(CROWS).pairs)["gap"].values
    score = pairs.crows_score(gaps)
    assert score.pairs == crows.PAIRS
    assert score.percent == pytest.approx(CROWS_SCORE, abs=0.1)
