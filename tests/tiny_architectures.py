"""Tiny random models of every family that nsp has a site table for, from their configurations.

The settings are chosen to expose mistakes: grouped-query heads, a head size that is not hidden/heads, a sliding window shorter than
the prompt, tied and untied embeddings, biases that are not zero, norms that are not one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers as hf

VOCABULARY = 96
WINDOW = 5
HIDDEN, HEADS, KV_HEADS, LAYERS, INNER = 32, 4, 2, 3, 40

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": INNER, "num_key_value_heads": KV_HEADS}
_MOE: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2, "head_dim": 12}
_WIDE = {"head_dim": 12}  # not hidden / heads = 8
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_SLIDING = {"sliding_window": WINDOW, "layer_types": _TYPES}


def _gemma3(**options: Any) -> Any:
    return hf.Gemma3TextConfig(**{**_GROUPED, **_WIDE, **_SLIDING, "query_pre_attn_scalar": 12, **options})


def _gemma3_wrapper() -> Any:
    vision = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return hf.Gemma3Config(
        text_config=_gemma3(), vision_config=vision, mm_tokens_per_image=4, image_token_index=90, boi_token_index=91,
        eoi_token_index=92,
    )  # fmt: skip


def _falcon(**options: Any) -> Any:
    return hf.FalconConfig(**{**_COMMON, "ffn_hidden_size": INNER, "bias": True, **options})


# name of the case -> (family in the table, how to make its configuration)
CASES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "gpt2": ("gpt2", lambda: hf.GPT2Config(**_COMMON, n_inner=INNER)),
    "gpt_neo": ("gpt_neo", lambda: hf.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_layers=3, num_heads=HEADS, intermediate_size=INNER, window_size=WINDOW,
        attention_types=[[["global", "local", "global"], 1]], max_position_embeddings=128, bos_token_id=1, eos_token_id=2)),
    "gpt_neox": ("gpt_neox", lambda: hf.GPTNeoXConfig(**_COMMON, intermediate_size=INNER, tie_word_embeddings=False)),
    "gpt_neox-sequential": ("gpt_neox", lambda: hf.GPTNeoXConfig(
        **_COMMON, intermediate_size=INNER, use_parallel_residual=False)),
    "gptj": ("gptj", lambda: hf.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, rotary_dim=4, n_positions=128,
        bos_token_id=1, eos_token_id=2)),
    "opt": ("opt", lambda: hf.OPTConfig(**_COMMON, ffn_dim=INNER, word_embed_proj_dim=HIDDEN)),
    "opt-post-norm": ("opt", lambda: hf.OPTConfig(
        **_COMMON, ffn_dim=INNER, word_embed_proj_dim=16, do_layer_norm_before=False)),
    "bloom": ("bloom", lambda: hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, bos_token_id=1, eos_token_id=2)),
    "bloom-post-norm": ("bloom", lambda: hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, bos_token_id=1, eos_token_id=2,
        apply_residual_connection_post_layernorm=True)),
    "falcon-multi-query": ("falcon", lambda: _falcon(multi_query=True, parallel_attn=True)),
    "falcon-new": ("falcon", lambda: _falcon(new_decoder_architecture=True, num_kv_heads=KV_HEADS)),
    "falcon-sequential": ("falcon", lambda: _falcon(multi_query=False, parallel_attn=False, tie_word_embeddings=False)),
    "falcon-alibi": ("falcon", lambda: _falcon(multi_query=False, parallel_attn=False, alibi=True)),
    "falcon-parallel-alibi": ("falcon", lambda: _falcon(multi_query=True, parallel_attn=True, alibi=True)),
    "llama": ("llama", lambda: hf.LlamaConfig(**_GROUPED, **_WIDE, attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", lambda: hf.MistralConfig(**_GROUPED, **_WIDE, sliding_window=WINDOW)),
    "mixtral": ("mixtral", lambda: hf.MixtralConfig(**_MOE, num_local_experts=4, sliding_window=WINDOW)),
    "qwen2": ("qwen2", lambda: hf.Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, tie_word_embeddings=True)),
    "qwen3": ("qwen3", lambda: hf.Qwen3Config(**_GROUPED, **_WIDE, attention_bias=True)),
    "qwen2_moe": ("qwen2_moe", lambda: hf.Qwen2MoeConfig(
        **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20,
        use_sliding_window=True, sliding_window=WINDOW, max_window_layers=3)),
    "qwen3_moe": ("qwen3_moe", lambda: hf.Qwen3MoeConfig(
        **_MOE, num_experts=4, moe_intermediate_size=12, mlp_only_layers=[1], attention_bias=True)),
    "gemma": ("gemma", lambda: hf.GemmaConfig(**_GROUPED, **_WIDE)),
    "gemma2": ("gemma2", lambda: hf.Gemma2Config(
        **_GROUPED, **_WIDE, **_SLIDING, query_pre_attn_scalar=12, final_logit_softcapping=1.0, attn_logit_softcapping=2.0)),
    "gemma3_text": ("gemma3_text", _gemma3),
    "gemma3": ("gemma3_text", _gemma3_wrapper),
    "phi": ("phi", lambda: hf.PhiConfig(**_GROUPED, qk_layernorm=True)),
    "phi3": ("phi3", lambda: hf.Phi3Config(**_GROUPED, sliding_window=WINDOW)),
    "olmo2": ("olmo2", lambda: hf.Olmo2Config(**_GROUPED, attention_bias=True)),
    "stablelm": ("stablelm", lambda: hf.StableLmConfig(**_GROUPED, use_qkv_bias=True)),
    "stablelm-parallel": ("stablelm", lambda: hf.StableLmConfig(
        **_GROUPED, use_parallel_residual=True, qk_layernorm=True)),
    "starcoder2": ("starcoder2", lambda: hf.Starcoder2Config(**_GROUPED, sliding_window=WINDOW)),
    "cohere": ("cohere", lambda: hf.CohereConfig(**_GROUPED, logit_scale=0.25, use_qk_norm=True)),
    "granite": ("granite", lambda: hf.GraniteConfig(
        **_GROUPED, residual_multiplier=0.22, embedding_multiplier=3.0, logits_scaling=4.0, attention_multiplier=0.3,
        attention_bias=True)),
    "smollm3": ("smollm3", lambda: hf.SmolLM3Config(
        **_GROUPED, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=WINDOW)),
    "gpt_oss": ("gpt_oss", lambda: hf.GptOssConfig(
        **_GROUPED, **_WIDE, **_SLIDING, num_local_experts=4, num_experts_per_tok=2)),
    "mamba": ("mamba", lambda: hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=4, bos_token_id=1, eos_token_id=2)),
    "jamba": ("jamba", lambda: hf.JambaConfig(
        **_GROUPED, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2, num_experts=4,
        num_experts_per_tok=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)),
}  # fmt: skip


@pytest.fixture
def quiet_and_alone() -> Iterator[None]:
    """One thread: tiny matrices gain nothing from more, and lose much where cores are shared. No advice from transformers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(before)


def tiny_model(case: str, seed: int = 0) -> torch.nn.Module:
    """The model of a case: every parameter random, biases and norms included, large enough for attention to be uneven."""
    return tiny_from(CASES[case][1](), seed)


def tiny_from(config: Any, seed: int = 0) -> torch.nn.Module:
    """A random model of a configuration."""
    torch.manual_seed(seed)
    kind = hf.AutoModelForImageTextToText if hasattr(config, "vision_config") else hf.AutoModelForCausalLM
    module = kind.from_config(config).eval()
    shake(module, seed)
    return module


def shake(module: torch.nn.Module, seed: int = 0) -> None:
    """Make weights, biases and norms large and random, so that no part of the model is a near no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("A_log", "dt_bias", "dt_proj.bias", ".D")):
                continue  # a state-space model's time constants
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
        module.requires_grad_(False)
