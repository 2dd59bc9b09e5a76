"""What a GGUF file says beside its weights, held against the model that transformers makes of it.

transformers reads the keys that it knows and passes over the rest: rotary scaling, softcaps, windows, scales. So every
key and every tensor is accounted for here. What transformers leaves out and its models can do is handed to them
(`rope_parameters`); whatever else differs from the model that was built is an InputError that names it.

Source of the keys: the GGUF specification (ggml, docs/gguf.md); of how rotary frequencies are scaled: llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nsp.errors import InputError

# The config's names for what a key says, without the architecture before it. A model has one of them.
_CONFIG_NAMES: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"),
    "embedding_length": ("hidden_size", "n_embd", "d_model"),
    "block_count": ("num_hidden_layers", "n_layer", "num_layers"),
    "feed_forward_length": ("intermediate_size", "n_inner", "feed_forward_length", "ffn_hidden_size", "d_ff"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads", "n_head", "num_heads"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.key_length": ("head_dim", "global_head_dim", "d_kv"),
    "attention.value_length": ("v_head_dim", "head_dim", "global_head_dim", "d_kv"),
    "attention.sliding_window": ("sliding_window",),
    "sliding_window": ("sliding_window",),
    "attention.scale": ("attention_multiplier", "scaling"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_top_k"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
    "shortconv.l_cache": ("conv_L_cache",),
    "decoder_start_token_id": ("decoder_start_token_id",),
    "attention.relative_buckets_count": ("relative_attention_num_buckets",),
}
# Values that ask for nothing: a model without the part that the key is about computes the same.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "rope.scaling.type": ("none",),
    "rope.scaling.finetuned": (True, False),
    "swin_norm": (False,),
}
# Keys about the rotary embedding, which `rope_parameters` reads and `check_rotary` proves.
_ROPE_SCALING = (
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip
# About the file, not about the numbers.
_ABOUT_THE_FILE = ("general.", "GGUF.", "quantize.", "imatrix.", "split.")
_ABOUT_THE_FILE_SUFFIXES = ("tensor_data_layout", "rope.dimension_count", "rope.freq_base")
_FREQUENCY_FACTORS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Metadata:
    """What a GGUF file says: its architecture, every key with its value, and its tensors by name.

    ``factors`` holds the tensors that scale rotary frequencies, float32 (frequency,).
    """

    path: Path
    architecture: str
    values: Mapping[str, Any]
    tensors: tuple[str, ...]
    factors: Mapping[str, np.ndarray]

    def get(self, suffix: str, default: Any = None) -> Any:
        """The value of a key of the architecture, such as ``rope.freq_base``."""
        return self.values.get(f"{self.architecture}.{suffix}", default)


def read_metadata(path: Path) -> Metadata:
    """Every key and tensor name of a GGUF file. InputError where it is one part of several, or an adapter."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    if int(values.get("split.count", 1)) > 1:
        raise InputError(
            f"{path} is one of {values['split.count']} parts. Merge them into one file first (llama-gguf-split --merge)."
        )
    if values.get("general.type", "model") != "model":
        raise InputError(f"{path} holds no model (general.type is {values['general.type']!r})")
    factors = {
        tensor.name: np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(-1)
        for tensor in reader.tensors
        if tensor.name in (_FREQUENCY_FACTORS, _LONG, _SHORT)
    }
    names = tuple(tensor.name for tensor in reader.tensors)
    return Metadata(path, str(values["general.architecture"]), values, names, factors)


def rope_parameters(metadata: Metadata, config: Any) -> dict[str, Any] | None:
    """The rotary embedding that the file describes, as the config states it; None where the config has it already.

    Raises InputError for a kind of scaling that transformers' models cannot compute from what the file says.
    """
    kind = metadata.get("rope.scaling.type", "linear" if metadata.get("rope.scale_linear") else "none")
    base = metadata.get("rope.freq_base")
    stated: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    if base is not None:
        stated["rope_theta"] = float(base)
    length = int(metadata.get("rope.scaling.original_context_length", 0)) or config.max_position_embeddings
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0)))
    attention = metadata.get("rope.scaling.attn_factor")
    if metadata.factors:
        if kind not in ("none", "longrope") and not (kind == "linear" and factor == 1.0):
            raise InputError(f"{metadata.path} scales its rotary frequencies twice: {kind} and {', '.join(metadata.factors)}")
        if _FREQUENCY_FACTORS in metadata.factors:
            # One factor for each frequency whatever the length, which is what LongRoPE computes from two equal lists.
            short = long = metadata.factors[_FREQUENCY_FACTORS].tolist()
            attention = 1.0 if attention is None else attention
        else:
            short, long = (metadata.factors[name].tolist() for name in (_SHORT, _LONG))
        return {
            **stated,
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": length,
            **({} if attention is None else {"attention_factor": float(attention)}),
        }
    if kind == "linear" and factor != 1.0:
        return {**stated, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaled = float(attention or 1.0) * (1.0 + 0.1 * math.log(factor))
        return {
            **stated,
            "rope_type": "yarn",
            "factor": factor,
            "attention_factor": scaled,
            "beta_fast": float(metadata.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(metadata.get("rope.scaling.yarn_beta_slow", 1.0)),
            "original_max_position_embeddings": length,
        }
    if kind not in ("none", "linear"):
        raise InputError(f"{metadata.path}: nsp cannot read rotary scaling of type {kind!r} from a GGUF file")
    return stated if base is not None and stated != getattr(config, "rope_parameters", None) else None


def check_keys(metadata: Metadata, config: Any) -> None:
    """InputError that names every key that says something else than the model that was built computes."""
    wrong = []
    for name, value in metadata.values.items():
        architecture, _, suffix = name.partition(".")
        if name.startswith((*_ABOUT_THE_FILE, "tokenizer.")):
            continue
        if architecture != metadata.architecture:
            wrong.append(f"{name} = {_shown(value)}")
        elif suffix in (*_ABOUT_THE_FILE_SUFFIXES, *_ROPE_SCALING) or value in _NEUTRAL.get(suffix, ()):
            continue
        elif not _agrees(config, suffix, value):
            wrong.append(f"{name} = {_shown(value)}")
    if wrong:
        raise InputError(
            f"{metadata.path} says what transformers' reader of GGUF files does not use, so its numbers would be wrong: "
            f"{'; '.join(wrong)}. A Hugging Face directory of the same model would work."
        )


def check_tensors(metadata: Metadata, used: Collection[str]) -> None:
    """InputError that names every tensor of the file that the model has no place for."""
    unused = [name for name in metadata.tensors if name not in used and name not in metadata.factors]
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise InputError(
            f"{metadata.path} holds weights that transformers' reader of GGUF files does not use, so its numbers would be "
            f"wrong: {', '.join(unused[:5])}{more}. A Hugging Face directory of the same model would work."
        )


def check_rotary(metadata: Metadata, module: Any) -> None:
    """InputError where the model's rotary frequencies are not those that the file describes."""
    inverse = next((buffer for name, buffer in module.named_buffers() if name.endswith("rotary_emb.inv_freq")), None)
    base, dimension = metadata.get("rope.freq_base"), metadata.get("rope.dimension_count")
    if inverse is None:
        if metadata.factors or metadata.get("rope.scaling.type", "none") not in ("none", "linear"):
            raise InputError(f"{metadata.path} scales rotary frequencies, and the model that was built has none")
        return
    found = inverse.double().cpu().numpy()
    if dimension is not None and 2 * len(found) != int(dimension):
        raise InputError(f"{metadata.path}: rope.dimension_count is {dimension}, the model turns {2 * len(found)} dimensions")
    scaled = metadata.get("rope.scaling.type", "none") == "yarn"
    if base is None or scaled or _LONG in metadata.factors:
        return
    wanted = float(base) ** -(np.arange(0, 2 * len(found), 2) / (2 * len(found)))
    wanted /= metadata.factors.get(_FREQUENCY_FACTORS, float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0))))
    if not np.allclose(found, wanted, rtol=1e-5):
        raise InputError(f"{metadata.path}: the model's rotary frequencies are not those of the file (rope.freq_base {base:g})")


def _agrees(config: Any, suffix: str, value: Any) -> bool:
    """Whether the config says the same under one of its names; a list agrees where every layer says it."""
    names = [name for name in _CONFIG_NAMES.get(suffix, ()) if getattr(config, name, None) is not None]
    if suffix == "attention.key_length" and "head_dim" not in names:
        return _close(value, config.hidden_size // config.num_attention_heads)
    if suffix == "attention.value_length" and not names:
        return _close(value, config.hidden_size // config.num_attention_heads)
    values = value if isinstance(value, list) else [value]
    return any(_same(getattr(config, name), values) for name in names)


def _same(stated: Any, values: list[Any]) -> bool:
    if isinstance(stated, list | tuple):
        return len(stated) == len(values) and all(map(_close, values, stated))
    largest = max(values) if all(isinstance(value, int | float) for value in values) else None
    return all(_close(value, stated) for value in values) or (0 in values and largest is not None and _close(largest, stated))


def _close(value: Any, stated: Any) -> bool:
    if isinstance(value, float) and isinstance(stated, int | float):
        return math.isclose(value, stated, rel_tol=1e-6)
    return bool(value == stated)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
