"""The tensor work of gradient rules: plain functions of torch, run inside a trace as `nsp.engine.kernels` are.

Every rule is a straight-through substitution: the value stays, bit by bit, and the gradient is that of a surrogate, a linear
function of the inputs whose coefficients are detached.
"""

from __future__ import annotations

from typing import Any

import torch

from nsp.engine.kernels import expert_gated

RULE = "the gradient rule"


def straight_through(value: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
    """``value`` in the forward pass, ``surrogate``'s gradient in the backward pass."""
    # x - (+0) is x for every x, a negative zero included; x + 0 is not.
    return value.detach() - (surrogate.detach() - surrogate).to(value.dtype)


def proportional(value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``factor`` times its detached coefficient in ``value``; where the factor is zero the coefficient is taken as zero."""
    zero = factor == 0
    coefficient = torch.where(zero, torch.zeros_like(value), value / torch.where(zero, torch.ones_like(factor), factor))
    return coefficient.detach() * factor


def product_surrogate(neurons: torch.Tensor, factors: Any) -> torch.Tensor:
    """An MLP's neurons as a linear function of what goes into them.

    One factor: an activation function, whose coefficient f(x) / x is detached. Two: gate and up projection, which
    multiply; each carries half, with the other (and the activation's coefficient) detached.
    """
    parts = [proportional(neurons, factor) for factor in factors]
    return torch.stack(parts).mean(dim=0)


def norm_surrogate(norm: Any, received: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
    """A norm's output as a linear function of its input, with the scale of each token detached.

    What the norm is (RMS or layer norm, weight, offset, bias) is read off its own outputs at three probes, so that no
    family's form can be forgotten. ``norm`` is the nnsight module. Raises ValueError where it is no such norm.
    """
    width = received.shape[-1]
    alternating = torch.ones(width, dtype=received.dtype, device=received.device)
    alternating[1::2] = -1
    alternating = alternating - alternating.mean()
    probes = torch.stack([torch.zeros_like(alternating), 64 * alternating, 64 * torch.ones_like(alternating)])
    with torch.no_grad():
        bias, at_alternating, at_constant = norm(probes[None])[0].unbind(0)
    gain = (at_alternating - bias) / alternating
    centred = bool((at_constant - bias).abs().max() < 1e-2 * (at_alternating - bias).abs().max())
    inside = received - received.mean(dim=-1, keepdim=True) if centred else received
    linear = inside * gain
    wide = linear.detach().double()
    size = (wide * wide).sum(dim=-1, keepdim=True)
    scale = ((normed.detach() - bias).double() * wide).sum(dim=-1, keepdim=True) / size.clamp_min(1e-300)
    surrogate: torch.Tensor = linear * scale.to(linear.dtype) + bias
    error, largest = (surrogate.detach() - normed.detach()).abs().max(), normed.detach().abs().max()
    if not bool(error <= (1e-3 if normed.dtype in (torch.float32, torch.float64) else 5e-2) * largest + 1e-30):
        raise ValueError(
            f"{RULE} for norms does not fit {type(norm._module).__name__}: it is no RMS or layer norm over its last axis"
        )
    return surrogate


def expert_factors(experts: Any, gated: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The two factors that an expert's gate multiplies: gate and up, as fused experts lay them out."""
    if getattr(experts, "is_concatenated", True):
        gate, up = gated.chunk(2, dim=-1)
        return (gate, up)
    # gpt-oss: interleaved, clamped, and the up projection is shifted by one.
    gate, up = gated[..., ::2], gated[..., 1::2]
    return (gate.clamp(max=experts.limit), up.clamp(min=-experts.limit, max=experts.limit) + 1)


def ruled_expert_neurons(experts: Any, states: torch.Tensor, routed: torch.Tensor, linear: bool) -> torch.Tensor:
    """Every expert's neurons, (token, expert x neuron), zero where a token is not sent; ``linear``: with the product rule."""
    every: Any = None
    count = experts.gate_up_proj.shape[0]
    for expert in range(count):
        token = (routed == expert).any(dim=-1).nonzero()[:, 0]
        gated = expert_gated(experts, states[token], expert)
        neurons = experts._apply_gate(gated)
        if linear:
            neurons = straight_through(neurons, product_surrogate(neurons.detach(), expert_factors(experts, gated)))
        if every is None:
            every = neurons.new_zeros(states.shape[0], count, neurons.shape[-1])
        every = every.index_put((token, torch.full_like(token, expert)), neurons)
    return every.flatten(1)  # type: ignore[no-any-return]


def expert_output(experts: Any, neurons: torch.Tensor, routed: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the experts make of their neurons, (token, expert x neuron): the sum over chosen experts, weighted, (token, width)."""
    count = experts.down_proj.shape[0]
    per_expert = neurons.reshape(len(neurons), count, -1)
    total: Any = None
    for expert in range(count):
        chosen = routed == expert
        token = chosen.any(dim=-1).nonzero()[:, 0]
        weight = experts.down_proj[expert]
        out = per_expert[token, expert] @ (weight if getattr(experts, "is_transposed", False) else weight.T)
        if getattr(experts, "has_bias", False):
            out = out + experts.down_proj_bias[expert]
        if total is None:
            total = out.new_zeros(neurons.shape[0], out.shape[-1])
        share = routed_share(routed, weights, expert)[token, None]
        total = total.index_add(0, token, out * share.to(out.dtype))
    return total  # type: ignore[no-any-return]


def routed_share(routed: torch.Tensor, weights: torch.Tensor, expert: int) -> torch.Tensor:
    """The router's weight of one expert at each token, (token,)."""
    return (weights * (routed == expert)).sum(dim=-1)


def capped(logits: torch.Tensor, softcap: float | None, logit_scale: float, linear: bool) -> torch.Tensor:
    """What the model does to the head's output, in float32; ``linear``: with the soft cap's coefficient detached."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        bounded = torch.tanh(logits / softcap) * softcap
        logits = straight_through(bounded, proportional(bounded.detach(), logits)) if linear else bounded
    return logits.double() if logits.dtype == torch.float64 else logits.float()


def edge_scores(plan: Any, tracked: Any, gradients: Any) -> torch.Tensor:
    """Edge attribution: (sender, receiver) sums over rows, positions and width of difference times gradient.

    ``plan`` is plain data (see `nsp.engine.edges`); ``tracked`` holds the tensors of the forward pass, ``gradients`` the
    metric's gradient at each. A receiver's gradient is carried back to the residual stream that it reads, and from there
    through the output projection (and norm after it) to a head that sends. NaN where no edge can be.
    """
    arrived: list[torch.Tensor] = []  # per receiver: gradient at the stream it reads, (row, position, width)
    for receiver in plan["receivers"]:
        of, stream, rows = receiver["of"], receiver["stream"], receiver["rows"]
        cotangent = gradients[of]
        if rows is None:
            batch = cotangent[None]
        else:
            view = cotangent.reshape(*cotangent.shape[:-1], receiver["split"], -1)
            batch = torch.zeros(len(rows), *view.shape, dtype=view.dtype, device=view.device)
            for number, row in enumerate(rows):
                batch[number, ..., row, :] = view[..., row, :]
            batch = batch.reshape(len(rows), *cotangent.shape)
        if of == stream:
            arrived.append(batch)
            continue
        arrived.append(carried_back(tracked[of], tracked[stream], batch))
    at_stream = torch.cat(arrived)
    result = torch.full((plan["senders"], len(at_stream)), float("nan"), dtype=torch.float64)
    for sender in plan["sending"]:
        reached = torch.as_tensor(sender["reaches"], device=at_stream.device)
        there = at_stream[reached] * sender["multiplier"]
        if sender["of"] != sender["into"]:
            there = carried_back(tracked[sender["into"]], tracked[sender["of"]], there)
        product = (there.double() * sender["difference"].to(there.device).double()).cpu()
        split = product.reshape(*product.shape[:-1], sender["split"], -1).sum(dim=(1, 2, -1))
        rows = torch.as_tensor(sender["rows"])
        result[torch.as_tensor(sender["numbers"])[:, None], reached.cpu()[None, :]] = split[:, rows].T
    return result


def carried_back(output: torch.Tensor, source: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Gradients at ``output``, (number, row, position, width), as gradients at the tensor ``source`` that it was made from."""
    shaped = slopes.reshape(len(slopes), *output.shape)
    (back,) = torch.autograd.grad(output, source, shaped, retain_graph=True, is_grads_batched=True)
    return back.reshape(*slopes.shape[:3], -1)
