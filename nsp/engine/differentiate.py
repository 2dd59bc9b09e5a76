"""Run one gradient program in one nnsight trace: a forward pass with rules and tracked tensors, then one backward pass.

As in `nsp.engine.execute`, the block below reads plain data and calls plain functions of torch only. The model's parameters
need no gradient: the first residual stream that matters is made a leaf, and everything after it has a graph.
"""

from __future__ import annotations

from typing import Any

import torch

from nsp.engine.kernels import metric_values, source_call
from nsp.engine.propagation_rule_kernels import (
    capped,
    edge_scores,
    expert_output,
    norm_surrogate,
    product_surrogate,
    ruled_expert_neurons,
    straight_through,
)


def differentiate(envoy: Any, program: Any) -> dict[str, Any]:
    """Run ``program`` (see `nsp.engine.gradients.GradientProgram`) and return what it asked for."""
    readout, final = program["readout"], program["final"]
    with torch.enable_grad(), envoy.trace(**program["inputs"]):
        values = [].save()  # type: ignore[attr-defined]
        slopes = [].save()  # type: ignore[attr-defined]
        measured = [].save()  # type: ignore[attr-defined]
        projected = [].save()  # type: ignore[attr-defined]
        edges = [].save()  # type: ignore[attr-defined]
        tracked: Any = {}  # number -> tensor whose gradient is asked for
        kept: Any = {}  # name -> tensor that a later rule needs
        for path in program["skipped"]:
            envoy.get(path).skip(program["first"])
        for stop in program["stops"]:
            side, place = stop["side"], stop["index"]
            module = envoy.get(stop["module"])
            routed: Any = None
            weights: Any = None
            call: Any = None
            if side == "layer":
                arguments, named = module.inputs
                whole = arguments[0] if arguments else named["hidden_states"]
            elif side == "experts":
                (states, routed, weights), _ = module.inputs
                whole = ruled_expert_neurons(module._module, states, routed, stop["linear"])
            elif side in ("call", "pattern"):
                call = source_call(module, place)
                whole = call.output
            else:
                whole = module.input if side == "input" else module.output
            if side == "pattern":
                received = whole[1] if isinstance(whole, tuple) else whole
            else:
                received = whole[place] if place is not None and side == "output" else whole
            # Some modules see all tokens in one axis.
            flat = received.dim() == 2
            value = received.reshape(program["rows"], -1, received.shape[-1]) if flat else received
            changed = side == "experts"
            for action in stop["actions"]:
                do = action["do"]
                if do == "leaf":
                    value = value if program["first"] is None else program["first"]
                    value = value.detach().requires_grad_(True)
                    changed = True
                elif do == "set":
                    mask = action["mask"].to(value.device)
                    value = torch.where(mask, action["value"].to(value.device, value.dtype), value)
                    changed = True
                elif do == "track":
                    # The very tensor that goes on, not a view of it.
                    tracked[action["number"]] = received if flat and not changed else value
                elif do == "keep":
                    chosen = value
                    if action["rows"] is not None:
                        view = value.reshape(*value.shape[:-1], action["split"], -1)
                        chosen = view[..., action["rows"], :].flatten(-2)
                    kept[action["name"]] = chosen
                elif do == "detach":
                    view = value.reshape(*value.shape[:-1], action["split"], -1)
                    mask = action["mask"].to(value.device)[:, None]
                    value = torch.where(mask, view.detach(), view).reshape(value.shape)
                    changed = True
                elif do == "norm":
                    value = straight_through(value, norm_surrogate(module, kept[action["of"]], value))
                    changed = True
                elif do == "product":
                    factors = [kept[name].reshape(value.shape) for name in action["of"]]
                    value = straight_through(value, product_surrogate(value.detach(), factors))
                    changed = True
                elif do == "alias":
                    # What follows changes this very tensor in place: it gets a copy.
                    value = value.clone()
                    changed = True
            if changed:
                value = value.reshape(received.shape)
                if side == "layer":
                    # A copy: a layer that adds to its input in place must not touch the tracked tensor.
                    value = value.clone()
                    if arguments:
                        arguments = (value, *arguments[1:])
                    else:
                        named = {**named, "hidden_states": value}
                    module.inputs = (arguments, named)
                elif side == "experts":
                    share = weights.detach() if stop["linear"] else weights
                    ruled = expert_output(module._module, value.reshape(whole.shape), routed, share)
                    # What the experts made themselves, changed by what setting neurons changes (nothing, where none is set).
                    unset = expert_output(module._module, whole, routed, share).detach()
                    module.output = module.output.detach() - (unset - ruled)
                elif side == "pattern":
                    call.output = (whole[0], value) if isinstance(whole, tuple) else value
                elif side == "call":
                    call.output = value
                elif side == "input":
                    module.input = value
                elif place is None:
                    module.output = value
                else:
                    module.output = (*whole[:place], value, *whole[place + 1 :])
        norm_module = envoy.get(final["module"])
        hidden = norm_module.input
        for action in final["settings"]:
            mask = action["mask"].to(hidden.device)
            hidden = torch.where(mask, action["value"].to(hidden.device, hidden.dtype), hidden)
            norm_module.input = hidden
        if final["number"] is not None:
            tracked[final["number"]] = hidden
        head = envoy.get(readout["head"])
        if final["linear"]:
            normed = norm_module.output
            norm_module.output = straight_through(normed, norm_surrogate(norm_module, hidden, normed))
        picked = head.input[readout["batch"], readout["column"]]
        if readout["vocabulary"] is None:
            raw = head(picked[None])[0]
        else:
            vocabulary = readout["vocabulary"].to(picked.device)
            bias = None if getattr(head._module, "bias", None) is None else head.bias[vocabulary]
            raw = torch.nn.functional.linear(picked, head.weight[vocabulary], bias)
        logits = capped(raw, readout["softcap"], readout["logit_scale"], readout["linear"])
        metric = metric_values(readout["kind"], logits, readout["tokens"], None)
        measured.append(metric.detach())
        if readout["logits"]:
            projected.append(logits.detach())
        head.skip(torch.zeros(1, 1, 1, dtype=picked.dtype, device=picked.device))
        numbers = sorted(tracked)
        wanted = [tracked[number] for number in numbers]
        reached = [tensor for tensor in wanted if tensor.requires_grad]
        reached_slopes = torch.autograd.grad(
            metric.sum(), reached, allow_unused=True, retain_graph=program["edges"] is not None
        ) if reached else ()  # fmt: skip
        slope_of: Any = {id(tensor): slope for tensor, slope in zip(reached, reached_slopes, strict=True)}
        for tensor in wanted:
            slope = slope_of.get(id(tensor))
            shape = (program["rows"], -1, tensor.shape[-1]) if tensor.dim() == 2 else tensor.shape
            slopes.append((torch.zeros_like(tensor) if slope is None else slope).reshape(shape))
            values.append(tensor.detach().reshape(shape))
        if program["edges"] is not None:
            gradients = dict(zip(numbers, slopes, strict=True))
            edges.append(edge_scores(program["edges"], tracked, gradients))
    return {
        "values": list(values),
        "gradients": list(slopes),
        "metric": measured[0],
        "logits": projected[0] if projected else None,
        "edges": edges[0] if edges else None,
    }
