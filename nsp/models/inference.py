"""A site table for a family that nsp does not know, inferred from its module tree and one forward pass.

What each layer adds to the residual stream is found by arithmetic on that pass (layer input + a + b = layer output), so it holds
whatever the modules are called. Names and orders of execution decide only where arithmetic cannot: which projection is the query's and
which the key's, and which half of a gated MLP is the gate.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nsp.models.fitting import path_of
from nsp.models.tables import INFERRED, Fused, SiteTable, Where, Window
from nsp.sites import IN_LAYER

_TOKENS = 6


@dataclass(eq=False)
class _Stop:
    """A module's run in the probing pass: its tensors with axes (position, width), in the order of execution."""

    path: str
    module: nn.Module
    given: torch.Tensor | None
    order: int
    made: torch.Tensor | None = None
    kept: torch.Tensor | None = None  # the very tensor that it returned, to see whether later code changed it
    in_tuple: bool = False
    after: int = -1


@dataclass(eq=False)
class _Seen:
    """What one layer did."""

    given: torch.Tensor
    made: torch.Tensor
    stops: list[_Stop] = field(default_factory=list)


def infer_table(module: nn.Module, config: Any) -> tuple[SiteTable, list[str]] | None:
    """The table and what was assumed, or None where there is no list of layers with a head behind it."""
    found = _layer_list(module, config)
    head, embedding = path_of(module, "get_output_embeddings"), path_of(module, "get_input_embeddings")
    if found is None or head is None or embedding is None:
        return None
    path, layers = found
    representatives = list({type(layer): number for number, layer in reversed(list(enumerate(layers)))}.values())[::-1]
    seen, final = _probe(module, path, layers, representatives, config.vocab_size)
    if final is None:
        return None
    components: dict[str, Where] = {}
    assumed = [f"layers at {path}", f"final norm at {final}"]
    for number in representatives:
        for name, where in _components(seen[number], config, assumed).items():
            components.setdefault(name, where)
    ordered = {name: components[name] for name in _ORDER if name in components}
    attention = ordered["z"].module.rpartition(".")[0] if "z" in ordered else ""
    parallel = "attn_out" in ordered and "mlp_out" in ordered and "resid_mid" not in ordered
    if parallel:
        assumed.append("attention and MLP in parallel, since no module receives a residual stream between them")
    call, window, branch = "", _window(module, path), ""
    if attention and "attention_interface(" in _source(layers[representatives[-1]], attention):
        call = "attention_interface_1"
    elif attention:
        assumed.append("no attention pattern")
    if not attention or len(representatives) > 1:
        branch = "not every layer has attention that nsp recognised"
    table = SiteTable(
        family=config.model_type, layers=path, final_norm=final, head=head, embedding=embedding, attention=attention, mlp="",
        components=ordered, parallel=parallel, attention_call=call, branch=branch, window=window,
        variant=INFERRED,
        missing={name: "none was found in its modules" for name in _ORDER if name not in ordered and not parallel},
    )  # fmt: skip
    assumed.append(
        ", ".join(f"{name} at {where.module} ({where.side})" for name, where in ordered.items())
        or "no component in a layer"
    )
    return table, assumed


_ORDER = tuple(name for name in IN_LAYER if name != "pattern")  # which no module makes


# --- the probing pass ---------------------------------------------------------------------------------------------------


def _layer_list(module: nn.Module, config: Any) -> tuple[str, list[nn.Module]] | None:
    counts = {getattr(config, name, None) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")}
    lists = [
        (sum(p.numel() for p in part.parameters()), name, list(part))
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList)
        and len(part) in counts
        and not re.search("vision|visual|audio|encoder", name)
    ]
    if not lists:
        return None
    _, name, layers = max(lists, key=lambda one: one[0])
    return name, layers


def _flat(value: Any) -> torch.Tensor | None:
    """A module's tensor as (position, width), or None where it is something else."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() not in (2, 3):
        return None
    flat = value.detach().reshape(-1, value.shape[-1])
    return flat if flat.shape[0] == _TOKENS else None


def _probe(
    module: nn.Module, path: str, layers: list[nn.Module], numbers: list[int], vocabulary: int
) -> tuple[dict[int, _Seen], str | None]:
    """Run once; returns what the layers ``numbers`` did, and the module that receives the last layer's output."""
    seen: dict[int, _Seen] = {}
    hooks, clock, ends, receivers = [], iter(range(10**9)), {}, []

    def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        value = args[0] if args else kwargs.get("hidden_states")
        flat = _flat(value)
        return None if flat is None else flat.clone()

    def watch(number: int, name: str, part: nn.Module) -> None:
        def before(_part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[number].stops.append(_Stop(name, part, first_tensor(args, kwargs), next(clock)))

        def after(_part: nn.Module, _args: Any, output: Any) -> None:
            stop = next(one for one in reversed(seen[number].stops) if one.module is part)
            flat = _flat(output)
            stop.made, stop.kept = (None if flat is None else flat.clone()), flat
            stop.in_tuple, stop.after = isinstance(output, tuple), next(clock)

        hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(part.register_forward_hook(after))

    for number in numbers:

        def enter(_part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
            given = first_tensor(args, kwargs)
            assert given is not None
            seen[number] = _Seen(given, given)

        def leave(_part: nn.Module, _args: Any, output: Any, number: int = number) -> None:
            made = _flat(output)
            assert made is not None
            seen[number].made = made.clone()

        hooks.append(layers[number].register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(layers[number].register_forward_hook(leave))
        for name, part in layers[number].named_modules():
            if name:
                watch(number, name, part)

    def last(_part: nn.Module, _args: Any, output: Any) -> None:
        made = _flat(output)
        if made is not None:
            ends["made"] = made.clone()

    hooks.append(layers[-1].register_forward_hook(last))
    for name, part in module.named_modules():
        if name and not name.startswith(path) and not path.startswith(name):

            def receive(_part: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                given = _flat(args[0]) if args else None
                if "made" in ends and given is not None and _same(given, ends["made"]):
                    receivers.append(name)

            hooks.append(part.register_forward_pre_hook(receive))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 4, max(vocabulary // 2, 1), (1, _TOKENS), generator=generator)
    try:
        with torch.no_grad():
            module(input_ids=ids.to(next(module.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, (receivers[0] if receivers else None)


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(found.dtype, 2e-2)
    spread = float(wanted.float().std()) or 1.0
    return float((found.float() - wanted.float()).abs().max()) <= tolerance * max(
        spread, float(wanted.float().abs().max())
    )


# --- components of one layer --------------------------------------------------------------------------------------------


def _components(seen: _Seen, config: Any, assumed: list[str]) -> dict[str, Where]:
    scale = float(getattr(config, "residual_multiplier", None) or 1.0)
    added = _added(seen, scale)
    if added is None:
        assumed.append("nothing was found that adds up to the residual stream, so there is no attn_out and no mlp_out")
        return {}
    attention, mlp = added
    found = {"attn_out": _output(attention), "mlp_out": _output(mlp)}
    assert attention.made is not None
    middle = seen.given.float() + scale * attention.made.float()
    reader = next(
        (
            one
            for one in seen.stops
            if one.order > attention.after and one.given is not None and _same(one.given, middle)
        ),
        None,
    )
    if reader is not None:
        found["resid_mid"] = Where(reader.path, "input")
    found |= _mlp_parts(seen, attention, mlp, assumed)
    found |= _attention_parts(seen, attention, config, assumed)
    if "z" not in found:
        # What a state-space mixer adds is no attention.
        found.pop("attn_out")
        found.pop("resid_mid", None)
    return found


def _added(seen: _Seen, scale: float) -> tuple[_Stop, _Stop] | None:
    """The two modules whose outputs are added to the layer's input: the first in order of those that fit."""
    width = seen.given.shape[-1]
    outputs = sorted(
        (one for one in seen.stops if one.made is not None and one.made.shape[-1] == width), key=lambda one: one.after
    )
    total = (seen.made.float() - seen.given.float()) / scale
    for number, first in enumerate(outputs):
        for second in outputs[number + 1 :]:
            assert first.made is not None
            assert second.made is not None
            if _same(first.made.float() + second.made.float(), total):
                return first, second
    return None


def _output(stop: _Stop) -> Where:
    changed = stop.made is not None and stop.kept is not None and not torch.equal(stop.made, stop.kept)
    return Where(stop.path, "output", 0 if stop.in_tuple else None, reused=changed)


def _linears(seen: _Seen) -> Iterator[tuple[_Stop, int, int]]:
    for one in seen.stops:
        if (
            one.given is not None
            and one.made is not None
            and not list(one.module.children())
            and hasattr(one.module, "weight")
        ):
            weight = one.module.weight
            if isinstance(weight, torch.Tensor) and weight.dim() == 2:
                yield one, one.given.shape[-1], one.made.shape[-1]


def _mlp_parts(seen: _Seen, attention: _Stop, mlp: _Stop, assumed: list[str]) -> dict[str, Where]:
    width = seen.given.shape[-1]
    linears = [item for item in _linears(seen) if attention.after < item[0].order and item[0].after <= mlp.after]
    experts = next(
        (one for one in seen.stops if hasattr(one.module, "_apply_gate") and one.order > attention.after), None
    )
    if experts is not None:
        assumed.append(f"the neurons are those of the experts in {experts.path}")
        return {"mlp_neurons": Where(experts.path, "experts")}
    down = next((one for one, _, out in reversed(linears) if out == width), None)
    if down is None:
        return {}
    assert down.given is not None
    neurons = down.given.shape[-1]
    parts = {"mlp_neurons": Where(down.path, "input")}
    ups = [one for one, into, out in linears if one.after < down.order and into == width and out == neurons]
    fused = [one for one, into, out in linears if one.after < down.order and into == width and out == 2 * neurons]
    if len(ups) == 1:
        parts["mlp_up"] = Where(ups[0].path, "output")
    elif len(ups) == 2:
        gate = next((one for one in ups if "gate" in one.path), ups[0])
        up = next(one for one in ups if one is not gate)
        if "gate" not in gate.path:
            assumed.append(f"{gate.path} is the gate, since it runs first")
        parts |= {"mlp_gate": Where(gate.path, "output"), "mlp_up": Where(up.path, "output")}
    elif fused:
        assumed.append(f"{fused[0].path} holds the gate first, then the up projection")
        parts |= {name: Where(fused[0].path, "output", fused="blocks") for name in ("mlp_gate", "mlp_up")}
    return parts


def _attention_parts(seen: _Seen, attention: _Stop, config: Any, assumed: list[str]) -> dict[str, Where]:
    width = seen.given.shape[-1]
    linears = [item for item in _linears(seen) if item[0].after <= attention.after]
    out = next((one for one, _, made in reversed(linears) if made == width), None)
    heads = next(
        (
            getattr(config, n)
            for n in ("num_attention_heads", "n_head", "n_heads", "num_heads")
            if getattr(config, n, None)
        ),
        0,
    )
    if out is None or out.given is None or not heads or out.given.shape[-1] % heads:
        return {}
    z = out.given.float().reshape(_TOKENS, heads, -1)
    into = [one for one, given, _ in linears if one.after < out.order and given == width and one.path != out.path]
    for one in into:
        assert one.made is not None
        rows = one.made.shape[-1] // z.shape[-1]
        if rows > heads and (rows - heads) % 2 == 0:
            order = _fused_order(one.made.float().reshape(_TOKENS, rows, -1), z, heads, (rows - heads) // 2)
            if order:
                assumed.append(f"{one.path} holds q, k, v heads in the order {order!r}")
                return {
                    **{name: Where(one.path, "output", fused=order) for name in ("q", "k", "v")},
                    "z": Where(out.path, "input"),
                }
    # The first token sees itself alone, so that its z is its v.
    value = next((one for one in into if one.made is not None and _is_value(one.made.float(), z)), None)
    value = value or _named("w?v|value", into)
    rest = [one for one in into if one is not value and one.made is not None and one.made.shape[-1] % z.shape[-1] == 0]
    if value is None or len(rest) < 2:
        return {}
    key = _named("w?k|key", rest) or rest[1]
    query = next(one for one in rest if one is not key)
    assumed.append(f"{query.path} is the query's projection and {key.path} the key's")
    return {"q": Where(query.path, "output"), "k": Where(key.path, "output"), "v": Where(value.path, "output"),
            "z": Where(out.path, "input")}  # fmt: skip


def _named(pattern: str, stops: list[_Stop]) -> _Stop | None:
    return next((one for one in stops if re.match(pattern, one.path.rpartition(".")[2])), None)


def _is_value(made: torch.Tensor, z: torch.Tensor) -> bool:
    size = z.shape[-1]
    if made.shape[-1] % size or z.shape[1] % (made.shape[-1] // size):
        return False
    groups = made[0].reshape(-1, size)
    return _same(groups.repeat_interleave(z.shape[1] // len(groups), dim=0), z[0])


def _fused_order(rows: torch.Tensor, z: torch.Tensor, heads: int, groups: int) -> Fused | None:
    """How v lies in a fused projection with axes (position, row, width): the layout in which the first token's v is its z."""
    if heads % groups:
        return None
    per_group = heads // groups
    candidates: dict[Fused, list[int]] = {
        "blocks": list(range(heads + groups, heads + 2 * groups)),
        "grouped": [group * (per_group + 2) + per_group + 1 for group in range(groups)],
    }
    for order, index in candidates.items():
        if _same(rows[0, index].repeat_interleave(per_group, dim=0), z[0]):
            return order
    return None


def _source(layer: nn.Module, path: str) -> str:
    try:
        return inspect.getsource(type(layer.get_submodule(path)).forward)
    except (OSError, TypeError, AttributeError):
        return ""


def _window(module: nn.Module, path: str) -> Window:
    try:
        code = inspect.getsource(type(module.get_submodule(path.rpartition(".")[0])))
    except (OSError, TypeError):
        return "single"
    return "by_type" if "causal_mask_mapping" in code else "single"
