"""Run one `Program` in one nnsight trace.

The block below is all that travels to a remote server: it reads plain data and calls `nsp.engine.kernels` only.
    Values are asked for
in the order in which the forward pass makes them, as nnsight requires.
"""

from __future__ import annotations

from typing import Any

import torch

from nsp.engine.kernels import (
    expert_change,
    expert_neurons,
    finished,
    metric_values,
    narrowed,
    next_tokens,
    pattern_rows,
    source_call,
    write,
)
from nsp.engine.program import Outputs, Program


def execute(envoy: Any, program: Program) -> Outputs:
    """Run ``program`` on an nnsight model and return what it asked for."""
    inputs, full, start = program["inputs"], program["batch"], program["start"]
    skipped, first, layers, final = program["skipped"], program["first"], program["layers"], program["final"]
    readout = program["readout"]
    cache: Any = inputs.get("past_key_values")
    with torch.no_grad(), envoy.trace(**inputs):
        norms = [].save()  # type: ignore[attr-defined]
        reads = [].save()  # type: ignore[attr-defined]
        measured = [].save()  # type: ignore[attr-defined]
        kept = [].save()  # type: ignore[attr-defined]
        chosen_tokens = [].save()  # type: ignore[attr-defined]
        for path in skipped:
            envoy.get(path).skip(first)
        for entry in layers:
            layer = envoy.get(entry["path"])
            rows = entry["rows"]
            bypass: Any = None
            copied: Any = entry.get("copied")
            joined = entry["join"] is not None or copied is not None
            if joined or rows < full or entry["writes"] or entry["reads"]:
                args, kwargs = layer.inputs
                hidden = args[0] if args else kwargs["hidden_states"]
                if entry["layer"] == start and first is not None:
                    hidden = first
                elif entry["join"] is not None:
                    hidden = torch.cat([hidden, entry["join"]])
                elif copied is not None:
                    hidden = torch.cat([hidden, hidden[copied[0], copied[1]]])
                elif entry["layer"] == start:
                    hidden = hidden[:rows]
                for step in entry["writes"]:
                    hidden, norm = write(hidden, step)
                    norms.append(norm)
                for step in entry["reads"]:
                    reads.append(hidden if step["batch"] is None else hidden[step["batch"], step["column"]])
                if rows < full:
                    args, kwargs = narrowed(args, full, rows), narrowed(kwargs, full, rows)
                if args:
                    args = (hidden, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": hidden}
                layer.inputs = (args, kwargs)
            if entry["keys"] is not None:
                cache.update(entry["keys"], entry["values"], entry["layer"])
            for visit in entry["visits"]:
                module = envoy.get(visit["module"])
                if visit["side"] == "pattern":
                    call = source_call(module, visit["index"])
                    states, _ = call.inputs
                    made = call.output
                    # Either the call that makes output and pattern, or the softmax whose output is the pattern.
                    attended, pattern = made if isinstance(made, tuple) else (None, made)
                    for step in visit["writes"]:
                        old = pattern[step["batch"], step["unit"], step["column"]]
                        new = pattern_rows(old, step)
                        pattern = pattern.clone()
                        pattern[step["batch"], step["unit"], step["column"]] = new
                        if attended is not None:
                            heads = states[3].repeat_interleave(pattern.shape[1] // states[3].shape[1], dim=1)
                            attended = attended.clone()
                            # The change is added: where the pattern stays the same, so does every bit of the output.
                            mixed = torch.einsum("nk,nkw->nw", new - old, heads[step["batch"], step["unit"]])
                            attended[step["batch"], step["column"], step["unit"]] += mixed
                        norms.append((new.float() - old.float()).norm(dim=-1))
                    if visit["writes"]:
                        call.output = pattern if attended is None else (attended, pattern)
                    for _ in visit["reads"]:
                        reads.append(pattern)
                    continue
                side, factor = visit["side"], visit["multiplier"]
                place: Any = visit["index"]
                if side == "experts":
                    (states, routed, weights), _ = module.inputs
                    whole = expert_neurons(module._module, states, routed)
                elif side == "call":
                    call = source_call(module, place)
                    whole = call.output
                else:
                    whole = module.input if side == "input" else module.output
                received = whole[place] if place is not None and side == "output" else whole
                # Some modules see all tokens in one axis.
                value = received.reshape(rows, -1, received.shape[-1]) if received.dim() == 2 else received
                if visit["reused"]:
                    value = value.clone()
                original = value
                if factor != 1.0:
                    value = value * factor
                scaled = value
                for step in visit["writes"]:
                    value, norm = write(value, step)
                    norms.append(norm)
                for step in visit["reads"]:
                    reads.append(value if step["batch"] is None else value[step["batch"], step["column"]])
                if visit["bypass"] == "leaves":
                    # The MLP reads the new stream here; the sum around it has the old one, and gets the change after
                    # the MLP.
                    bypass = value - scaled
                elif visit["bypass"] == "arrives":
                    value = value + bypass
                if visit["writes"] or visit["bypass"] == "arrives":
                    if factor != 1.0:
                        # What no write touched keeps every bit.
                        value = torch.where(value == scaled, original, value / factor)
                    value = value.reshape(received.shape)
                    if side == "input":
                        module.input = value
                    elif side == "call":
                        call.output = value
                    elif side == "experts":
                        module.output = module.output + expert_change(module._module, value - received, routed, weights)
                    elif place is None:
                        module.output = value
                    else:
                        module.output = (*whole[:place], value, *whole[place + 1 :])
            trim = entry["trim"]
            if trim is not None:
                mlp = envoy.get(trim["module"])
                received = mlp.input
                made = torch.zeros_like(received)
                made[trim["batch"], trim["column"]] = mlp(received[trim["batch"], trim["column"]][None])[0]
                mlp.skip(made)
        norm_module = envoy.get(final["path"])
        hidden = norm_module.input
        if start == final["layer"] and first is not None:
            hidden = first
        elif final["join"] is not None:
            hidden = torch.cat([hidden, final["join"]])
        elif final.get("copied") is not None:
            row, column = final["copied"]
            hidden = torch.cat([hidden, hidden[row, column]])
        for step in final["writes"]:
            hidden, norm = write(hidden, step)
            norms.append(norm)
        for step in final["reads"]:
            reads.append(hidden if step["batch"] is None else hidden[step["batch"], step["column"]])
        if readout is None:
            # Nothing is measured: the head is left out, where it is known.
            norm_module.input = hidden[:1] if program.get("head") else hidden[:1, :1]
            if program.get("head"):
                envoy.get(program["head"]).skip(hidden.new_zeros(1, 1, 1))
        else:
            # Some models reshape to the prompt's length after the norm: the readouts fill rows of that length.
            picked, columns = hidden[readout["batch"], readout["column"]], hidden.shape[1]
            filler = picked[:1].expand(-len(picked) % columns, -1)
            norm_module.input = torch.cat([picked, filler]).reshape(-1, columns, picked.shape[-1])
            head = envoy.get(readout["head"])
            normed = head.input.flatten(0, 1)[None, : len(picked)]
            vocabulary = readout["vocabulary"]
            if vocabulary is not None:
                weight = head.weight[vocabulary]
                bias = None if getattr(head._module, "bias", None) is None else head.bias[vocabulary]
                logits = torch.nn.functional.linear(normed[0], weight, bias)
                logits = finished(logits, readout["softcap"], readout["logit_scale"])
                if readout["logits"]:
                    kept.append(logits)
                for metric in readout["metrics"]:
                    chosen = logits if metric["select"] is None else logits[metric["select"]]
                    measured.append(metric_values(metric["kind"], chosen, metric["tokens"], None))
            else:
                for metric in readout["metrics"]:
                    count = normed.shape[1] if metric["select"] is None else len(metric["select"])
                    measured.append(torch.zeros(count, dtype=torch.float32, device=normed.device))
                for low in range(0, normed.shape[1], readout["chunk"]):
                    high = min(low + readout["chunk"], normed.shape[1])
                    logits = finished(head(normed[:, low:high])[0], readout["softcap"], readout["logit_scale"])
                    if readout["logits"]:
                        kept.append(logits)
                    if readout["choice"] is not None:
                        chosen_tokens.append(next_tokens(logits, readout["choice"], low))
                    for number, metric in enumerate(readout["metrics"]):
                        select: Any = metric["select"]
                        rows_of: Any = metric["reference_row"]
                        inside: Any = None if select is None else (select >= low) & (select < high)
                        chosen = logits if inside is None else logits[select[inside] - low]
                        span = slice(low, high) if inside is None else inside
                        tokens = None if metric["tokens"] is None else metric["tokens"][span]
                        reference = None
                        if metric["reference"] is not None:
                            reference = metric["reference"][rows_of[span]]
                        measured[number][span] = metric_values(metric["kind"], chosen, tokens, reference)
            # The head itself need not run: everything asked of it has been computed.
            head.skip(torch.zeros(1, 1, 1, dtype=normed.dtype, device=normed.device))
    return {
        "norms": list(norms),
        "reads": list(reads),
        "metrics": list(measured),
        "logits": torch.cat(list(kept)) if kept else None,
        "chosen": torch.cat(list(chosen_tokens)) if chosen_tokens else None,
    }
