"""Logits are the model's own: what follows the head is compared with the model's forward on first use, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, HyperCLOVAXConfig, LlamaConfig, LlamaForCausalLM, MptConfig

import nsp
from nsp.errors import InputError

IDS = [5, 9, 11, 70, 4]
SIZE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "a scale that multiplies": lambda: HyperCLOVAXConfig(**SIZE, logits_scaling=4.0),
    "a scale that is not used": lambda: MptConfig(
        vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2, logit_scale=0.25
    ),
}


@pytest.mark.filterwarnings("ignore:nsp has no site table")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("swept", [False, True])
def test_logits_are_the_models_own(config: Any, swept: bool) -> None:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config()).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.mul_(20 if parameter.dim() > 1 else 1)
    own = module(torch.tensor([IDS])).logits[0, -1]
    with nsp.load(module).trace(IDS) as t:
        if swept:
            t.sweep(nsp.scale("resid_post[0] @ 1,2", 1.0))
        t.measure(nsp.logit(7), nsp.prob(7))
    assert np.ravel(t.results["logit"].values) == pytest.approx(float(own[7]), abs=1e-4)
    assert np.ravel(t.results["prob"].values) == pytest.approx(float(own.softmax(0)[7]), abs=1e-5)


class Bent(LlamaForCausalLM):
    """A model whose forward does something to its logits that no configuration names."""

    def forward(self, *given: Any, **keys: Any) -> Any:
        output = super().forward(*given, **keys)
        output.logits = output.logits + 3.0 * torch.tanh(output.logits)
        return output


def test_what_follows_the_head_unknown_is_refused() -> None:
    torch.manual_seed(0)
    module = Bent(LlamaConfig(**SIZE)).eval()
    with pytest.raises(InputError, match="not the model's own"), nsp.load(module).trace(IDS) as t:
        t.measure(nsp.logit(7))
