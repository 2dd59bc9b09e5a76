"""The site tables, one a family (and one more for each variant that differs in where things are).

To add a family: write its table here, as a change of a like one; add a tiny configuration of it to
``tests/tiny_architectures.py`` with settings that would expose mistakes; the check (`nsp.conformance`, ``nsp check``) must be
green on it. See `nsp.models.tables` for what each field means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nsp.models.tables import SiteTable, Where


def _changed(base: SiteTable, components: Mapping[str, Where | None] | None = None, **fields: Any) -> SiteTable:
    """A table like another one; a component set to None is left out, others keep their place in the order."""
    merged = {**base.components, **(components or {})}
    kept = {name: where for name, where in merged.items() if where is not None}
    return replace(base, components=kept, **{"notes": "", **fields})


def _experts(base: SiteTable, router: str, **fields: Any) -> SiteTable:
    """A table whose MLP is a mixture of fused experts, ``experts`` beside the router in the MLP's module."""
    table = _changed(base, dict.fromkeys(("mlp_gate", "mlp_up", "mlp_neurons", "mlp_out")))
    inner = base.mlp
    components = {
        **table.components,
        "mlp_neurons": Where(f"{inner}.experts", "experts"),
        "mlp_out": fields.pop("mlp_out", Where(inner, "output")),
    }
    gate = f"{inner}.{router}"
    fused = "the projections of all experts are one fused tensor inside one function; mlp_neurons has every expert's neurons"
    return replace(
        table,
        components=components,
        modules={gate: Where(gate, "call", call="F_linear_0")},
        missing={"mlp_gate": fused, "mlp_up": fused},
        **{"notes": f"router logits: module:{base.layers}.<layer>.{gate}", **fields},
    )


LLAMA = SiteTable(
    family="llama",
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    embedding="model.embed_tokens",
    attention="self_attn",
    mlp="mlp",
    components={
        "q": Where("self_attn.q_proj", "output"),
        "k": Where("self_attn.k_proj", "output"),
        "v": Where("self_attn.v_proj", "output"),
        "z": Where("self_attn.o_proj", "input"),
        "attn_out": Where("self_attn.o_proj", "output"),
        "resid_mid": Where("post_attention_layernorm", "input"),
        "mlp_gate": Where("mlp.gate_proj", "output"),
        "mlp_up": Where("mlp.up_proj", "output"),
        "mlp_neurons": Where("mlp.down_proj", "input"),
        "mlp_out": Where("mlp", "output"),
    },
)
MISTRAL = _changed(LLAMA, family="mistral")
QWEN2 = _changed(LLAMA, family="qwen2", window="by_type")
QWEN3 = _changed(QWEN2, family="qwen3")
SMOLLM3 = _changed(QWEN2, family="smollm3")
GEMMA = _changed(LLAMA, family="gemma")
GRANITE = _changed(LLAMA, family="granite", notes="attn_out and mlp_out include the residual multiplier")

GEMMA2 = _changed(
    LLAMA,
    {
        "attn_out": Where("post_attention_layernorm", "output"),
        "resid_mid": Where("pre_feedforward_layernorm", "input"),
        "mlp_out": Where("post_feedforward_layernorm", "output"),
    },
    family="gemma2",
    window="by_type",
    notes="attn_out and mlp_out are taken after their post-norms",
)
GEMMA3 = _changed(GEMMA2, family="gemma3_text", notes=GEMMA2.notes)
OLMO2 = _changed(GEMMA2, {"resid_mid": Where("mlp", "input")}, family="olmo2", window="single", notes=GEMMA2.notes)

MIXTRAL = _experts(LLAMA, "gate", family="mixtral")
QWEN2_MOE = _experts(
    QWEN2,
    "gate",
    family="qwen2_moe",
    notes="router logits: module:model.layers.<layer>.mlp.gate; mlp_neurons are the routed experts', the shared expert's are "
    "behind module:model.layers.<layer>.mlp.shared_expert.up_proj; layers with a plain MLP have no mlp_neurons",
)
QWEN3_MOE = _experts(
    LLAMA,
    "gate",
    family="qwen3_moe",
    notes="router logits: module:model.layers.<layer>.mlp.gate; layers with a plain MLP have no mlp_neurons",
)
# Its MLP returns a pair, which leaving out tokens does not make.
GPT_OSS = _experts(
    QWEN2, "router", family="gpt_oss", mlp="", mlp_out=Where("mlp", "output", index=0),
    notes="router logits: module:model.layers.<layer>.mlp.router; attention rows sum to less than one (sinks)",
)  # fmt: skip

PHI3 = _changed(
    LLAMA,
    {
        "q": Where("self_attn.qkv_proj", "output", fused="blocks"),
        "k": Where("self_attn.qkv_proj", "output", fused="blocks"),
        "v": Where("self_attn.qkv_proj", "output", fused="blocks"),
        "mlp_gate": Where("mlp.gate_up_proj", "output", fused="blocks"),
        "mlp_up": Where("mlp.gate_up_proj", "output", fused="blocks"),
    },
    family="phi3",
)
STARCODER2 = _changed(
    LLAMA,
    {
        "mlp_gate": None,
        "mlp_up": Where("mlp.c_fc", "output"),
        "mlp_neurons": Where("mlp.c_proj", "input"),
    },
    family="starcoder2",
)
STABLELM = _changed(LLAMA, family="stablelm", applies=lambda config: not config.use_parallel_residual)
STABLELM_PARALLEL = _changed(
    LLAMA, {"resid_mid": None}, family="stablelm", variant="parallel", parallel=True,
    applies=lambda config: bool(config.use_parallel_residual),
)  # fmt: skip
COHERE = _changed(LLAMA, {"resid_mid": None}, family="cohere", parallel=True)
PHI = _changed(
    STARCODER2,
    {
        "z": Where("self_attn.dense", "input"),
        "attn_out": Where("self_attn.dense", "output"),
        "resid_mid": None,
        "mlp_up": Where("mlp.fc1", "output"),
        "mlp_neurons": Where("mlp.fc2", "input"),
    },
    family="phi",
    final_norm="model.final_layernorm",
    parallel=True,
)

GPT2 = SiteTable(
    family="gpt2",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    head="lm_head",
    embedding="transformer.wte",
    attention="attn",
    mlp="mlp",
    components={
        "q": Where("attn.c_attn", "output", fused="blocks"),
        "k": Where("attn.c_attn", "output", fused="blocks"),
        "v": Where("attn.c_attn", "output", fused="blocks"),
        "z": Where("attn.c_proj", "input"),
        "attn_out": Where("attn.c_proj", "output"),
        "resid_mid": Where("ln_2", "input"),
        "mlp_up": Where("mlp.c_fc", "output"),
        "mlp_neurons": Where("mlp.c_proj", "input"),
        "mlp_out": Where("mlp", "output"),
    },
)
GPT_NEO = _changed(
    GPT2,
    {
        "q": Where("attn.attention.q_proj", "output"),
        "k": Where("attn.attention.k_proj", "output"),
        "v": Where("attn.attention.v_proj", "output"),
        "z": Where("attn.attention.out_proj", "input"),
        "attn_out": Where("attn.attention.out_proj", "output"),
    },
    family="gpt_neo",
    attention="attn.attention",
    attention_call="self__attn_0/nn_functional_softmax_0",
    branch="its local attention counts columns of the row, not positions",
)
GPTJ = _changed(
    GPT2,
    {
        "q": Where("attn.q_proj", "output"),
        "k": Where("attn.k_proj", "output"),
        "v": Where("attn.v_proj", "output"),
        "z": Where("attn.out_proj", "input"),
        "attn_out": Where("attn.out_proj", "output"),
        "resid_mid": None,
        "mlp_up": Where("mlp.fc_in", "output"),
        "mlp_neurons": Where("mlp.fc_out", "input"),
    },
    family="gptj",
    attention_call="self__attn_0/nn_functional_softmax_0",
    parallel=True,
)

_NEOX = SiteTable(
    family="gpt_neox",
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    embedding="gpt_neox.embed_in",
    attention="attention",
    mlp="mlp",
    components={
        "q": Where("attention.query_key_value", "output", fused="interleaved"),
        "k": Where("attention.query_key_value", "output", fused="interleaved"),
        "v": Where("attention.query_key_value", "output", fused="interleaved"),
        "z": Where("attention.dense", "input"),
        "attn_out": Where("attention.dense", "output"),
        "resid_mid": Where("post_attention_layernorm", "input"),
        "mlp_up": Where("mlp.dense_h_to_4h", "output"),
        "mlp_neurons": Where("mlp.dense_4h_to_h", "input"),
        "mlp_out": Where("mlp", "output"),
    },
)
GPT_NEOX = _changed(
    _NEOX, {"resid_mid": None}, parallel=True, applies=lambda config: bool(config.use_parallel_residual)
)
GPT_NEOX_SEQUENTIAL = _changed(_NEOX, variant="sequential", applies=lambda config: not config.use_parallel_residual)

_BLOOM = _changed(
    _NEOX,
    {
        "q": Where("self_attention.query_key_value", "output", fused="interleaved"),
        "k": Where("self_attention.query_key_value", "output", fused="interleaved"),
        "v": Where("self_attention.query_key_value", "output", fused="interleaved"),
        "z": Where("self_attention.dense", "input"),
        "attn_out": Where("self_attention.dense", "output"),
        # The MLP's own output already includes the residual stream.
        "mlp_out": Where("mlp.dense_4h_to_h", "output"),
    },
    family="bloom",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    head="lm_head",
    embedding="transformer.word_embeddings",
    attention="self_attention",
    mlp="",
    attention_call="F_softmax_0",
    branch="its ALiBi biases are built from a mask of two axes",
)
BLOOM = _changed(_BLOOM, applies=lambda config: not config.apply_residual_connection_post_layernorm)
BLOOM_POST_NORM = _changed(
    _BLOOM,
    {"resid_mid": None},
    variant="residual after norm",
    applies=lambda config: bool(config.apply_residual_connection_post_layernorm),
    stream="each sublayer's output is added to the normalised stream",
    missing={"resid_mid": "its sublayers' outputs are added to the normalised stream"},
)

_FALCON = _changed(
    _BLOOM,
    {
        **{name: replace(_BLOOM.components[name], fused="grouped") for name in ("q", "k", "v")},
        # The layer adds the attention's output to this tensor in place.
        "mlp_out": Where("mlp", "output", reused=True),
    },
    family="falcon",
    mlp="mlp",
    branch="",
)
_EAGER_ALIBI = "transformers adds the ALiBi biases twice under eager attention"
FALCON_ALIBI = _changed(
    _FALCON, variant="sequential, ALiBi", applies=lambda config: bool(config.alibi and not _falcon_parallel(config)),
    attention_call="", branch=_BLOOM.branch, eager=_EAGER_ALIBI, missing={"pattern": _EAGER_ALIBI},
)  # fmt: skip
FALCON_PARALLEL_ALIBI = _changed(
    FALCON_ALIBI, {"resid_mid": None}, variant="parallel, ALiBi", parallel=True,
    applies=lambda config: bool(config.alibi and _falcon_parallel(config)),
)  # fmt: skip
FALCON_SEQUENTIAL = _changed(_FALCON, variant="sequential", applies=lambda config: not _falcon_parallel(config))
FALCON = _changed(_FALCON, {"resid_mid": None}, parallel=True, applies=lambda _config: True)


def _falcon_parallel(config: Any) -> bool:
    return bool(config.new_decoder_architecture or config.parallel_attn)


_OPT = SiteTable(
    family="opt",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    embedding="model.decoder.embed_tokens",
    attention="self_attn",
    mlp="",
    components={
        "q": Where("self_attn.q_proj", "output"),
        "k": Where("self_attn.k_proj", "output"),
        "v": Where("self_attn.v_proj", "output"),
        "z": Where("self_attn.out_proj", "input"),
        "attn_out": Where("self_attn.out_proj", "output"),
        "resid_mid": Where("final_layer_norm", "input"),
        "mlp_up": Where("fc1", "output"),
        "mlp_neurons": Where("fc2", "input"),
        "mlp_out": Where("fc2", "output"),
    },
)
OPT = _changed(_OPT, applies=lambda config: bool(config.do_layer_norm_before))
# OPT-350m: the stream is normalised after each addition, and projected to the embedding's width at the end.
OPT_POST_NORM = _changed(
    _OPT,
    {"resid_mid": None},
    variant="norm after",
    final_norm="model.decoder.project_out",
    applies=lambda config: not config.do_layer_norm_before,
    stream="the stream is normalised after each addition",
    missing={"resid_mid": "its residual stream is normalised after attention, so nothing can be added to it there"},
)

_NO_CACHE = "a state-space layer keeps a state, not keys and values that branches could share"
MAMBA = SiteTable(
    family="mamba",
    layers="backbone.layers",
    final_norm="backbone.norm_f",
    head="lm_head",
    embedding="backbone.embeddings",
    attention="",
    mlp="",
    components={},
    attention_call="",
    branch=_NO_CACHE,
    notes="a layer's mixer is module:backbone.layers.<layer>.mixer",
)
JAMBA = _changed(
    LLAMA,
    {
        "resid_mid": Where("pre_ff_layernorm", "input"),
        "mlp_gate": Where("feed_forward.gate_proj", "output"),
        "mlp_up": Where("feed_forward.up_proj", "output"),
        "mlp_neurons": Where("feed_forward.down_proj", "input"),
        "mlp_out": Where("feed_forward", "output"),
    },
    family="jamba",
    final_norm="model.final_layernorm",
    mlp="",
    modules={"feed_forward.router": Where("feed_forward.router", "call", call="F_linear_0")},
    branch=_NO_CACHE,
    notes="q, k, v, z, pattern and attn_out in attention layers; mlp_gate, mlp_up and mlp_neurons in layers without "
    "experts; a state-space layer's mixer is module:model.layers.<layer>.mamba",
)

_ALL = (
    GPT2, GPT_NEO, GPT_NEOX, GPT_NEOX_SEQUENTIAL, GPTJ, OPT, OPT_POST_NORM, BLOOM, BLOOM_POST_NORM,
    FALCON_ALIBI, FALCON_PARALLEL_ALIBI, FALCON_SEQUENTIAL, FALCON, LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE,
    GEMMA, GEMMA2, GEMMA3, PHI, PHI3, OLMO2, STABLELM, STABLELM_PARALLEL, STARCODER2, COHERE, GRANITE, SMOLLM3, GPT_OSS,
    MAMBA, JAMBA,
)  # fmt: skip

TABLES: dict[str, tuple[SiteTable, ...]] = {
    family: tuple(table for table in _ALL if table.family == family) for family in dict.fromkeys(t.family for t in _ALL)
}


def table_for(config: Any) -> SiteTable | None:
    """The table of a language model's configuration, or None where nsp has none for its family."""
    return next((table for table in TABLES.get(config.model_type, ()) if table.applies(config)), None)
