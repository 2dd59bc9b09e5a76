"""NaN in, NaN out, with a report: no comparison, rank, arg-max or count makes a number of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nsp
from nsp.errors import NspError
from nsp.metrics import METRICS

IDS, OTHER = [5, 9, 11, 70, 4], [5, 8, 11, 70, 4]
TOKENS = {"logit_diff": (7, 9), "log_odds": (7, 9), "cross_entropy": (7,)}


@pytest.fixture(scope="module")
def model() -> nsp.Model:
    """A model whose last layer overflows, as float16 may."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    module.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return nsp.load(module)


def patched(model: nsp.Model, metric: nsp.Metric) -> float:
    """The metric with one site patched."""
    with model.trace(IDS) as t:
        t.patch("resid_post[0] @ 1", donor=OTHER)
        t.measure(metric)
    return float(t.results[metric.name].item())


@pytest.mark.parametrize("kind", [kind for kind in METRICS if kind not in ("function", "projection")])
def test_every_metric_of_nan_logits_is_nan_and_says_so(model: nsp.Model, kind: str) -> None:
    tokens = TOKENS.get(kind, (7,) * METRICS[kind].tokens)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        value = patched(model, getattr(nsp, kind)(*tokens))
    assert np.isnan(value)


def test_a_lens_has_no_rank_where_logits_are_nan(model: nsp.Model) -> None:
    with pytest.warns(RuntimeWarning, match="NaN logits at layer 1"):
        lens = nsp.experiments.logit_lens(model, [IDS], tokens=[7])["effects/lens"]
    last = lens.to_dataset().isel(prompt=0, layer=-1)
    assert (last["rank"].values == -1).all()
    assert (last["output_rank"].values == -1).all()
    assert np.isnan(last["divergence"].values).all()
    first = lens.to_dataset().isel(prompt=0, layer=0)
    assert (first["rank"].values >= 0).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_no_token_is_generated_from_nan(model: nsp.Model, options: dict[str, Any]) -> None:
    with pytest.raises(NspError, match=r"(?i)nan"), model.trace(IDS) as t:
        t.generate(4, **options)
