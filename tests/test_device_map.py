"""A model spread over devices by accelerate: writes land where the layer is, and the numbers are the same.

A machine of tests has one device, so the second one is the disk: those weights are on ``meta`` but while their module runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engine_models as tiny
import pytest
import torch
from accelerate import dispatch_model
from test_backends import STATEMENTS, assert_same, run

import nsp


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> nsp.Model:
    module = tiny.module("llama")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(tiny.LAYERS)}
    folder: Path = tmp_path_factory.mktemp("offload")
    dispatched: Any = dispatch_model(module, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return nsp.load(dispatched, tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("state", STATEMENTS, ids=lambda one: one.__name__)
def test_the_numbers_are_those_of_the_whole_model(spread: nsp.Model, state: Any) -> None:
    away = {name for name, weight in spread.module.named_parameters() if weight.is_meta}
    assert any("layers.1" in name for name in away)
    assert not any("layers.0" in name for name in away)
    assert spread.runtime.device == torch.device("cpu")
    assert_same(run(spread, state), run(tiny.model("llama"), state))
