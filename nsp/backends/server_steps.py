"""What runs on the server: steps of plain data, one after the other, in one nnsight session.

The text of this module travels with every job, beside those of `nsp.engine.kernels` and `nsp.engine.execute` (see
`nsp.backends.shipping`), to a server that has no nsp: torch, transformers and plain data only.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from nsp.engine.differentiate import differentiate
from nsp.engine.execute import execute
from nsp.engine.execution_order import watched


def submit(envoy: Any, backend: Any, steps: Any, wanted: Any, attention: Any) -> Any:
    """Run ``steps`` as one job and return the values of the steps numbered in ``wanted``, on the CPU."""
    with torch.no_grad(), envoy.session(backend=backend):
        results = run_job(envoy, steps, wanted, attention).save()
    return results  # noqa: RET504 -- nnsight puts the saved value under this name


def run_job(envoy: Any, steps: Any, wanted: Any, attention: Any) -> Any:
    """`run_steps` with the model's attention as wanted; the model is left as it was found."""
    module = envoy._module
    before = getattr(module.config, "_attn_implementation", None)
    if not attention or attention == before:
        return run_steps(envoy, steps, wanted)
    switch_attention(module, attention)
    try:
        return run_steps(envoy, steps, wanted)
    finally:
        switch_attention(module, before)


def switch_attention(module: Any, implementation: Any) -> None:
    """Another attention implementation for a model."""
    module.set_attn_implementation(implementation)
    if module.config._attn_implementation != implementation:
        # Falcon chooses by its configuration when it runs, though transformers takes it for fixed.
        module.config._attn_implementation_internal = implementation


def run_steps(envoy: Any, steps: Any, wanted: Any) -> Any:
    """The values of the wanted steps. A step's ``{"__ref__": n}`` is the value of step ``n``."""
    device = next(envoy._module.parameters()).device
    values: list[Any] = []
    last = last_reads(steps, wanted)
    for number, step in enumerate(steps):
        item = placed(step, values, device)
        if item["do"] == "run":
            value: Any = run_program(envoy, item["program"])
        elif item["do"] == "differentiate":
            value = run_gradients(envoy, item["program"])
        elif item["do"] == "watch":
            value = watched(envoy._module, item["layers"], item["count"])
        elif item["do"] == "get":
            value = item["run"][item["key"]]
            value = value if item["index"] is None else value[item["index"]]
        elif item["do"] == "item":
            value = item["of"][item["index"]]
        elif item["do"] == "weight":
            value = envoy._module
            for name in item["path"].split("."):
                value = getattr(value, name)
        elif item["do"] == "set":
            value = item["of"].clone()
            value[item["index"]] = item["value"]
        else:
            function: Any = torch
            for name in item["name"].split("."):
                function = getattr(function, name)
            value = function(*item["args"], **item["kwargs"])
        values.append(value)
        item = value = None
        for done in last.get(number, ()):
            values[done] = None  # keys and values of a pass are large
    return [values[number].detach().cpu() for number in wanted]


def last_reads(steps: Any, wanted: Any) -> Any:
    """The values that are read for the last time by each step, by its number; those that are wanted are kept."""
    reader: Any = {}

    def look(item: Any, number: Any) -> None:
        if isinstance(item, dict):
            if "__ref__" in item:
                reader[item["__ref__"]] = number
            for part in item.values():
                look(part, number)
        elif isinstance(item, (list, tuple)):
            for part in item:
                look(part, number)

    for number, step in enumerate(steps):
        look(step, number)
    found: Any = {}
    for value, number in reader.items():
        if value not in wanted:
            found.setdefault(number, []).append(value)
    return found


def run_program(envoy: Any, program: Any) -> Any:
    """One forward pass; its outputs, and the keys and values of its cache."""
    touch_sources(envoy, [visit for entry in program["layers"] for visit in entry["visits"]])
    mask, hook = program["inputs"].get("attention_mask"), None
    if isinstance(mask, dict):
        # One mask a kind of attention: nnsight's wrapper takes a mask for one tensor, so it is given behind its back.
        inputs = {name: value for name, value in program["inputs"].items() if name != "attention_mask"}
        program = {**program, "inputs": inputs}
        hook = envoy._module.register_forward_pre_hook(giving(mask), with_kwargs=True)
    try:
        outputs = dict(execute(envoy, program))
    finally:
        if hook is not None:
            hook.remove()
    cache = program["inputs"].get("past_key_values")
    if cache is not None:
        outputs["keys"] = [layer.keys for layer in cache.layers]
        outputs["values"] = [layer.values for layer in cache.layers]
    return outputs


def giving(mask: Any) -> Any:
    """A hook that runs a model with this attention mask, whatever it was called with."""

    def give(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    return give


def run_gradients(envoy: Any, program: Any) -> Any:
    """One forward and one backward pass; its outputs."""
    touch_sources(envoy, program["stops"])
    return differentiate(envoy, program)


def touch_sources(envoy: Any, stops: Any) -> None:
    """Have nnsight rewrite the forwards that ``stops`` look inside: within a running forward it is too late."""
    for stop in stops:
        if stop["side"] in ("pattern", "call"):
            _ = envoy.get(stop["module"]).source


def placed(item: Any, values: Any, device: Any) -> Any:
    """A step with earlier values in the places of their references, its tensors on the model's device."""
    if isinstance(item, torch.Tensor):
        return item.to(device)
    if isinstance(item, dict):
        if "__ref__" in item:
            return values[item["__ref__"]]
        if "__cache__" in item:
            cache = DynamicCache()
            for layer, pair in enumerate(item["__cache__"]):
                if pair[0] is not None:
                    keys, held = placed(pair[0], values, device), placed(pair[1], values, device)
                    cache.update(keys, held, layer)
            return cache
        return {key: placed(part, values, device) for key, part in item.items()}
    if isinstance(item, list):
        return [placed(part, values, device) for part in item]
    if isinstance(item, tuple):
        return tuple(placed(part, values, device) for part in item)
    return item
