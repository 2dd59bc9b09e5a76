"""The tensor work that happens inside a forward pass: plain functions of torch and plain data.

Nothing here knows of sites, plans or models, so the same functions run in a local trace and, shipped by source, on a
server that has no nsp. No imports inside functions, no classes, no state.
"""

from __future__ import annotations

from typing import Any

import torch

APPLIED = "the applied function"


def write(value: torch.Tensor, step: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply one group of writes to a tensor with axes (row, column, width).

    ``step`` holds index tensors ``batch``, ``column`` and ``unit`` with axis (write), the number of unit ``rows``
    that the last axis is split into, ``kind`` (``set``, ``add``, ``scale``, ``project`` or ``apply``) and ``operand``
    with axes (write, unit width); for ``project`` directions of length 1. Instead of an operand, ``taken`` says at which
    row and column of the tensor the values stand.

    Returns the new tensor and the L2 norm of the change of each write, in float32.
    """
    view = value.reshape(value.shape[0], value.shape[1], step["rows"], -1).clone()
    old = view[step["batch"], step["column"], step["unit"]]
    if "taken" in step:
        row, column = step["taken"]
        step = {**step, "operand": view[row, column, step["unit"]]}
    new = changed(old, step)
    view[step["batch"], step["column"], step["unit"]] = new
    norm = (new.float() - old.float()).norm(dim=-1)
    return view.reshape(value.shape), norm


def changed(old: torch.Tensor, step: Any) -> torch.Tensor:
    """The new values of one group of writes, in the dtype of the old ones, with axes (write, unit width)."""
    kind = step["kind"]
    if kind == "apply":
        new = old.clone()
        for group in step["groups"]:
            given = old[group]
            made = step["function"](given.clone())
            if not isinstance(made, torch.Tensor) or made.shape != given.shape:
                shape = tuple(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
                raise ValueError(
                    f"{APPLIED} at {step['name']} got a tensor of shape {tuple(given.shape)} and must return one; it gave {shape}"
                )
            new[group] = made.to(old.dtype)
        return new
    operand = step["operand"].to(old.dtype)
    if kind == "set":
        return operand.expand_as(old)
    if kind == "add":
        return old + operand
    if kind == "blend":
        return torch.where(step["keep"], old, operand)
    if kind == "project":
        # At least in float32: a dot product along the width of half-precision numbers loses digits.
        wide = old if old.dtype == torch.float64 else old.float()
        direction = step["operand"].to(wide.dtype)
        return (wide - (wide * direction).sum(dim=-1, keepdim=True) * direction).to(old.dtype)
    return old * operand


def pattern_rows(old: torch.Tensor, step: Any) -> torch.Tensor:
    """New attention weights of one group of writes, with axes (write, key column).

    A patched pattern comes over the key positions of a whole prompt; ``keys`` says at which column each of them lies
    here.
    """
    operand = step["operand"].to(old.dtype)
    if step["kind"] == "set":
        return torch.zeros_like(old).scatter_add(1, step["keys"], operand)
    return old * operand


def source_call(module: Any, name: Any) -> Any:
    """The call of that name in an nnsight module's forward code; ``a/b`` is call b inside the function a."""
    source = module.source
    for part in str(name).split("/")[:-1]:
        source = getattr(source, part).source
    return getattr(source, str(name).split("/")[-1])


def expert_gated(experts: Any, states: torch.Tensor, expert: int) -> torch.Tensor:
    """What one expert's gate gets of states (token, width): its gate and up projections side by side."""
    weight = experts.gate_up_proj[expert]
    gated: torch.Tensor = states @ (weight if getattr(experts, "is_transposed", False) else weight.T)
    return gated + experts.gate_up_proj_bias[expert] if getattr(experts, "has_bias", False) else gated


def expert_neurons(experts: Any, states: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """Every expert's neurons, (token, expert x neuron), expert after expert; zero for experts that a token is not
    sent to.

    ``experts`` is a module with fused ``gate_up_proj`` and ``down_proj`` (transformers' experts), ``states`` (token,
    width) what it receives and ``routed`` (token, chosen) the experts of each token.
    """
    count = experts.gate_up_proj.shape[0]
    made = None
    for expert in range(count):
        token = (routed == expert).any(dim=-1).nonzero()[:, 0]
        neurons = experts._apply_gate(expert_gated(experts, states[token], expert))
        if made is None:
            made = neurons.new_zeros(states.shape[0], count, neurons.shape[-1])
        made[token, expert] = neurons
    return made.flatten(1)  # type: ignore[union-attr]


def expert_change(experts: Any, change: torch.Tensor, routed: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What a change of the experts' neurons, (token, expert x neuron), adds to their output, (token, width)."""
    count = experts.down_proj.shape[0]
    per_expert = change.reshape(len(change), count, -1)
    added = None
    for expert in range(count):
        chosen = routed == expert
        token = chosen.any(dim=-1).nonzero()[:, 0]
        weight = experts.down_proj[expert]
        out = per_expert[token, expert] @ (weight if getattr(experts, "is_transposed", False) else weight.T)
        if added is None:
            added = out.new_zeros(change.shape[0], out.shape[-1])
        share = (weights * chosen)[token].sum(dim=-1, keepdim=True)
        added = added.index_add(0, token, out * share.to(out.dtype))
    return added  # type: ignore[return-value]


def narrowed(item: Any, full: int, rows: int) -> Any:
    """Keep the first ``rows`` of every batched tensor in a layer's arguments (``full`` is the whole batch's size).

    One-axis tensors (positions of the cache) are not batched and pass through.
    """
    if isinstance(item, torch.Tensor):
        return item[:rows] if item.dim() > 1 and item.shape[0] == full else item
    if isinstance(item, tuple):
        return tuple(narrowed(part, full, rows) for part in item)
    if isinstance(item, list):
        return [narrowed(part, full, rows) for part in item]
    if isinstance(item, dict):
        return {key: narrowed(part, full, rows) for key, part in item.items()}
    return item


def finished(logits: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """What the model does to the head's output, then float32 (overflow in half precision stops here)."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.float()


def metric_values(
    kind: Any, logits: torch.Tensor, tokens: torch.Tensor | None, reference: torch.Tensor | None
) -> torch.Tensor:
    """One metric for each row of float32 logits with axes (row, token); ``tokens`` (row, 1 or 2; a set: as many
    as it has), ``reference`` (row, token). ``kind`` is a metric's name, or a function of the logits.

    Sums over the vocabulary run in float64: at 150 000 entries float32 loses digits that a KL near zero needs.
    """
    if not isinstance(kind, str):
        return applied_metric(kind, logits)
    if kind == "logit":
        return logits.gather(1, tokens[:, :1])[:, 0]  # type: ignore[index]
    if kind == "logit_diff":
        pair = logits.gather(1, tokens)  # type: ignore[arg-type]
        return pair[:, 0] - pair[:, 1]
    if kind == "rank":
        return ranks(logits, logits.gather(1, tokens[:, :1]))  # type: ignore[index]
    if kind in ("rank_change", "top1_change"):
        own, before = logits.gather(1, tokens[:, :1]), reference.gather(1, tokens[:, :1])  # type: ignore[index,union-attr]
        rank, rank_before = ranks(logits, own), ranks(reference, before)  # type: ignore[arg-type]
        if kind == "rank_change":
            return rank - rank_before
        return (rank == 0).float() - (rank_before == 0).float() + 0.0 * (rank + rank_before)  # NaN where a rank is
    if kind == "log_odds":
        # log P(set) - log(1 - P(set)), as a difference of two sums, so that neither end rounds to zero.
        wide = logits.double()
        inside = torch.zeros_like(wide, dtype=torch.bool).scatter(1, tokens, True)  # type: ignore[arg-type]
        for_set = wide.masked_fill(~inside, float("-inf")).logsumexp(dim=1)
        return (for_set - wide.masked_fill(inside, float("-inf")).logsumexp(dim=1)).float()
    if kind == "top1":
        same = (logits.argmax(dim=1) == reference.argmax(dim=1)).float()  # type: ignore[union-attr]
        return same.masked_fill(torch.isnan(logits + reference).any(dim=1), float("nan"))  # type: ignore[operator]
    if kind in ("l2", "mse", "cosine"):
        here, there = logits.double(), reference.double()  # type: ignore[union-attr]
        if kind == "cosine":
            return (1.0 - torch.nn.functional.cosine_similarity(here, there, dim=1)).float()
        squared = (here - there).pow(2)
        return (squared.sum(dim=1).sqrt() if kind == "l2" else squared.mean(dim=1)).float()
    log_p = torch.log_softmax(logits.double(), dim=1)
    p = log_p.exp()
    if kind == "logprob":
        return log_p.gather(1, tokens[:, :1])[:, 0].float()  # type: ignore[index]
    if kind == "prob":
        return log_p.gather(1, tokens[:, :1])[:, 0].exp().float()  # type: ignore[index]
    if kind == "entropy":
        return torch.special.entr(p).sum(dim=1).float()
    log_r = torch.log_softmax(reference.double(), dim=1)  # type: ignore[union-attr]
    r = log_r.exp()
    if kind == "kl":
        return divergence(r, log_r, log_p).float()
    if kind == "kl_reverse":
        return divergence(p, log_p, log_r).float()
    if kind == "js":
        mixed = torch.logaddexp(log_p, log_r) - 0.6931471805599453
        return (0.5 * (divergence(p, log_p, mixed) + divergence(r, log_r, mixed))).float()
    raise ValueError(f"unknown metric kind {kind!r}")


def applied_metric(function: Any, logits: torch.Tensor) -> torch.Tensor:
    """What a function of one's own makes of float32 logits (row, token): one number a row, float32."""
    found = function(logits.clone())
    if not isinstance(found, torch.Tensor) or found.shape != logits.shape[:1]:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(
            f"{APPLIED} of a metric got logits of shape {tuple(logits.shape)} and must return one number a row, "
            f"shape ({len(logits)},); it gave {shape}"
        )
    return found.float()


def divergence(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row; an entry with p = 0 adds nothing, whatever q is. NaN where p or q is."""
    return torch.where(p == 0, torch.zeros_like(p), p * (log_p - log_q)).sum(dim=1)


def ranks(logits: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """How many entries of each row of logits (row, token) are above ``own`` (row, 1): float32 (row,), NaN where one is NaN.

    A comparison with NaN is false, so that a count alone would call every token the most likely one.
    """
    return (logits > own).sum(dim=1).float().masked_fill(torch.isnan(logits).any(dim=1), float("nan"))


def next_tokens(logits: torch.Tensor, choice: Any, low: int) -> torch.Tensor:
    """A token for each row of float32 logits: the most likely one, or the one that the row's uniform number falls on.

    Sampling inverts the cumulative distribution over tokens in order of probability, so one number decides one token. -1
    where a logit is NaN: no token is the most likely one then.
    """
    unknown = torch.isnan(logits).any(dim=1)
    if choice["temperature"] == 0:
        return logits.argmax(dim=1).masked_fill(unknown, -1)
    probabilities, order = torch.softmax(logits.double() / choice["temperature"], dim=1).sort(
        dim=1, descending=True, stable=True
    )
    if choice["top_k"] is not None:
        probabilities[:, choice["top_k"] :] = 0
    cumulative = probabilities.cumsum(dim=1)
    if choice["top_p"] is not None:
        # A token stays while the mass before it is below p, so the most likely one always stays.
        probabilities = probabilities * (cumulative - probabilities < choice["top_p"] * cumulative[:, -1:])
        cumulative = probabilities.cumsum(dim=1)
    uniform = choice["uniform"][low : low + len(logits), None].to(cumulative.device)
    place = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return order.gather(1, place)[:, 0].masked_fill(unknown, -1)
