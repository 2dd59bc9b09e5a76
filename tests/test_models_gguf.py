"""GGUF files: every key and tensor is used, or refused by name; the numbers are those of the model in the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama, write_gguf
from transformers import LlamaForCausalLM

import nsp
from nsp.errors import InputError

IDS = list(range(3, 9)) * 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSP_CACHE", str(tmp_path / "cache"))


def scaled(**rope: Any) -> LlamaForCausalLM:
    """The tiny model with another rotary embedding."""
    plain = tiny_llama()
    config = plain.config
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    module = LlamaForCausalLM(config).eval()
    module.load_state_dict(plain.state_dict())
    return module


def logits(module: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(module(torch.tensor([IDS])).logits[0].float().numpy())


def read(path: Path) -> np.ndarray:
    with nsp.load(path, device="cpu").trace(IDS) as t:
        t.record("logits @ *")
    return np.asarray(t.results["logits"].values).reshape(len(IDS), -1)


def test_frequency_factors_are_used(tmp_path: Path) -> None:
    module = scaled(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    )
    inverse = module.model.rotary_emb.inv_freq.numpy()
    plain = 10000.0 ** -(np.arange(0, 2 * len(inverse), 2) / (2 * len(inverse)))
    factors = (plain / inverse).astype(np.float32)
    assert not np.allclose(factors, 1.0)
    path = write_gguf(tmp_path / "a.gguf", module, tensors={"rope_freqs.weight": factors})
    np.testing.assert_allclose(read(path), logits(module), atol=2e-5)


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope.scale_linear": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        ),
    ],
)
def test_rotary_scaling_is_used(tmp_path: Path, rope: dict[str, Any], keys: dict[str, Any]) -> None:
    module = scaled(**rope)
    assert np.abs(logits(module) - logits(tiny_llama())).max() > 1e-4
    path = write_gguf(tmp_path / "a.gguf", module, keys={f"llama.{key}": value for key, value in keys.items()})
    np.testing.assert_allclose(read(path), logits(module), atol=2e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.type", "longrope"),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.attention.sliding_window", 8),
        ("llama.logit_scale", 0.5),
        ("llama.embedding_scale", 12.0),
        ("llama.residual_scale", 0.25),
        ("llama.attention.scale", 0.125),
        ("llama.attention.layer_norm_epsilon", 0.1),
        ("llama.attention.key_length", 64),
        ("llama.attention.causal", False),
        ("llama.a_key_of_tomorrow", 1),
        ("other.block_count", 2),
        ("tokenizer.ggml.pre", "a-cut-of-tomorrow"),
        ("tokenizer.ggml.add_space_prefix", True),
        ("tokenizer.ggml.add_sep_token", True),
        ("tokenizer.rwkv.world", "x"),
    ],
)
def test_what_is_not_used_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), keys={key: value})
    with pytest.raises(InputError, match=re.escape(str(value) if key.endswith("scaling.type") else key)):
        nsp.load(path, device="cpu")


def test_a_rotary_embedding_of_another_width_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), keys={"llama.rope.dimension_count": 2})
    with pytest.raises(InputError, match="other shapes than its keys say"):
        nsp.load(path, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.sliding_window", 0),
        ("llama.final_logit_softcapping", 0.0),
        ("llama.logit_scale", 1.0),
        ("llama.rope.scaling.type", "none"),
        ("llama.expert_count", 0),
        ("general.source.url", "https://example.org"),
        ("tokenizer.ggml.add_bos_token", False),
        ("tokenizer.ggml.add_space_prefix", False),
    ],
)
def test_a_key_that_asks_for_nothing_is_no_obstacle(tmp_path: Path, key: str, value: Any) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), keys={key: value})
    np.testing.assert_allclose(read(path), logits(tiny_llama()), atol=2e-5)


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q.bias": np.ones(32, dtype=np.float32)}
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), tensors=extra)
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.bias"):
        nsp.load(path, device="cpu")


@pytest.mark.parametrize(("end", "place"), [("bos", 0), ("eos", -1)])
def test_texts_begin_and_end_as_the_file_says(tmp_path: Path, end: str, place: int) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), keys={f"tokenizer.ggml.add_{end}_token": True})
    token = {"bos": 1, "eos": 2}[end]
    for _ in range(2):  # converted, and read from the cache
        model = nsp.load(path, device="cpu")
        ids = model.encode("a b").token_ids
        assert ids[place] == token
        assert token not in ids[1:-1]
    plain = write_gguf(tmp_path / "b.gguf", tiny_llama())
    assert token not in nsp.load(plain, device="cpu").encode("a b").token_ids
