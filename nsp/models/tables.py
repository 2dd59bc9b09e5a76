"""Where each component lives in each architecture: one declarative table per family.

A table says, relative to one decoder layer, which module's input or output holds a component and, where several
components share one tensor (GPT-2's fused ``c_attn``), how the rows of heads lie in it. Everything else (counts, widths)
is read from the model itself by `nsp.models.geometry`. Adding a family is one `SiteTable` entry here.

Definitions that hold in every family:

- ``resid_pre[l]`` is what layer ``l`` receives, ``resid_post[l]`` what it hands on (so ``resid_post[l]`` and
  ``resid_pre[l + 1]`` are one tensor); ``embed`` is the residual stream before the first layer, positions included.
- ``attn_out`` and ``mlp_out`` are what is *added* to the residual stream: after a post-norm where a family has one.
- ``q``, ``k``, ``v`` are the projections' outputs with their bias, before rotary embedding and before a query/key norm.
- ``z`` is the per-head attention output before the output projection; ``mlp_neurons`` the input of the down projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["input", "output"]
Fused = Literal["", "blocks", "interleaved", "grouped"]


@dataclass(frozen=True)
class Where:
    """One tensor inside a decoder layer, and which of its unit rows belong to a component.

    Attributes:
        module: path of the module relative to the layer (empty: the layer itself).
        side: whether the tensor is the module's ``input`` or its ``output``.
        index: element of a tuple output, or None where the output is the tensor.
        fused: how query, key and value heads share the tensor: ``blocks`` (all q heads, then k, then v),
            ``interleaved`` (q, k, v of head 0, then of head 1, ...), ``grouped`` (per key/value group: its q heads, k, v),
            or empty where the tensor holds one component. For gate and up, ``blocks`` is gate first.
    """

    module: str
    side: Side
    index: int | None = None
    fused: Fused = ""


@dataclass(frozen=True)
class SiteTable:
    """The sites of one family.

    Attributes:
        layers, final_norm, head, embedding: module paths from the root of the causal language model.
        attention, mlp: module paths relative to a layer.
        components: component name -> `Where`, in the order in which the forward pass reaches them.
        parallel: attention and MLP both read ``resid_pre``, so ``resid_mid`` does not exist.
        attention_call: the name under nnsight's ``.source`` of the call that computes attention, for ``pattern``.
        branch: why the branch path does not apply, or empty where it does.
        window: how sliding windows enter the mask: ``single`` (one 4-D mask for all layers, windowed where the
            configuration says so) or ``by_type`` (a dict of masks by attention type).
    """

    family: str
    layers: str
    final_norm: str
    head: str
    embedding: str
    attention: str
    mlp: str
    components: Mapping[str, Where]
    parallel: bool = False
    attention_call: str = "attention_interface_1"
    branch: str = ""
    window: Literal["single", "by_type"] = "single"
    notes: str = field(default="", compare=False)


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
    notes="no gate: mlp_up is the projection before the activation function",
)

TABLES: dict[str, SiteTable] = {table.family: table for table in (LLAMA, GPT2)}
