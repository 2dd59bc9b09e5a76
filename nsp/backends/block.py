"""What runs on the server: steps of plain data, one after the other, in one nnsight session.

The text of this module travels with every job, beside those of `nsp.engine.kernels` and `nsp.engine.execute` (see
`nsp.backends.shipping`), to a server that has no nsp: torch, transformers and plain data only.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from nsp.engine.execute import execute


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
    for step in steps:
        item = placed(step, values, device)
        if item["do"] == "run":
            value: Any = run_program(envoy, item["program"])
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
    return [values[number].detach().cpu() for number in wanted]


def run_program(envoy: Any, program: Any) -> Any:
    """One forward pass; its outputs, and the keys and values of its cache."""
    for entry in program["layers"]:
        for visit in entry["visits"]:
            if visit["side"] in ("pattern", "call"):
                # nnsight rewrites a forward when its source is first touched, which inside a running one is too late.
                _ = envoy.get(visit["module"]).source
    outputs = dict(execute(envoy, program))
    cache = program["inputs"].get("past_key_values")
    if cache is not None:
        outputs["keys"] = [layer.keys for layer in cache.layers]
        outputs["values"] = [layer.values for layer in cache.layers]
    return outputs


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
