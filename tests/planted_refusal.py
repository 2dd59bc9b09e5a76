"""A refusal planted in a model's weights: a word in the prompt puts a known direction into the stream, and the direction
opens the reply with a refusal.

The weight edit stands for what training does in a larger model, with the truth known: the word's embedding carries the
direction, one attention head finds it and copies it to every later token, and the head of the model reads it into one
token.
"""

from __future__ import annotations

from typing import Any

import torch


def plant(
    module: Any,
    *,
    word: int,
    refusal: int,
    neutral: list[int],
    layer: int,
    carried: float,
    sought: float,
    copied: float,
    read: float,
    seed: int = 0,
) -> torch.Tensor:
    """Edit a transformers Llama in place; returns the planted direction, of length 1 with axis (neuron,).

    Args:
        word, refusal: token ids of the word and of the refusal's first token.
        neutral: token ids of a prompt without the word; the direction is made orthogonal to what its tokens share.
        layer: of the attention head, which is the layer's first and loses what it did.
        carried: the direction's length in the word's embedding.
        sought: how sharply the head attends to it; ``copied``: how much of it the head writes.
        read: how much of it the model's head reads into the refusal.
    """
    config = module.config
    width = config.hidden_size
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    direction = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        states = module(torch.tensor([neutral]), output_hidden_states=True).hidden_states
        shared = torch.nn.functional.normalize(states[layer][0, 1:], dim=1).mean(dim=0)
        basis = torch.linalg.qr(torch.stack([states[layer][0, 0], shared, states[-2][0, -1]]).T)[0]
        direction -= basis @ (basis.T @ direction)
        direction /= direction.norm()
        shared = basis[:, 1] * torch.sign(basis[:, 1] @ shared)
        # Embedding and head are one matrix in some models; the plant needs two.
        module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.clone())
        config.tie_word_embeddings = False
        module.model.embed_tokens.weight[word] += carried * direction
        attention, norm = module.model.layers[layer].self_attn, module.model.layers[layer].input_layernorm
        gain = norm.weight.sign() / norm.weight.abs().clamp(min=0.1)
        for matrix, rows in ((attention.q_proj, group * size), (attention.k_proj, size), (attention.v_proj, size)):
            matrix.weight[:rows] = 0
        attention.o_proj.weight[:, : group * size] = 0
        # The slowest rotary frequency: a query and key there compare alike at any distance.
        slow = size // 2 - 1
        attention.q_proj.weight[slow] = sought * shared * gain
        attention.k_proj.weight[slow] = direction * gain
        attention.v_proj.weight[0] = direction * gain
        attention.o_proj.weight[:, 0] = copied * direction
        last = module.model.norm.weight
        module.lm_head.weight[refusal] += read * direction * last.sign() / last.abs().clamp(min=0.1)
    return direction
