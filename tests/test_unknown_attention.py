"""Attention that nsp's masks do not know runs on the plain path, whose numbers are the model's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

import nsp


@pytest.mark.filterwarnings("ignore:nsp has no site table")
def test_chunked_attention_takes_the_plain_path_and_is_exact() -> None:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        intermediate_size_mlp=40, head_dim=8, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    assert "chunked_attention" in config.layer_types
    module = Llama4ForCausalLM(config).eval().requires_grad_(False)
    base = list(range(5, 16))  # longer than a chunk
    donor = [*base[:3], 60, *base[4:]]
    with nsp.load(module).trace(base) as t:
        t.sweep(nsp.patch("resid_post[1] @ 3,5", donor=donor))
        t.measure(nsp.logit(7))
    assert t.receipts[0].path == "plain"
    states = module(torch.tensor([donor]), output_hidden_states=True).hidden_states[2][0]
    for cell, position in enumerate((3, 5)):

        def replaced(_module: Any, _given: Any, out: Any, at: int = position) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            hidden[0, at] = states[at]
            return out

        hook = module.model.layers[1].register_forward_hook(replaced)
        true = float(module(torch.tensor([base])).logits[0, -1, 7])
        hook.remove()
        assert np.ravel(t.results["logit"].values)[cell] == pytest.approx(true, abs=2e-5)
