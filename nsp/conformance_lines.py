"""The lines of the conformance list (see `nsp.conformance`): each yields deviations, with where they were found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from nsp.conformance_bench import Bench, NotApplicable, Off, apart
from nsp.datasets.prompts import Prompt
from nsp.engine.generation import Decoding, generate
from nsp.engine.kernels import expert_change
from nsp.engine.measuring import measure
from nsp.engine.planning import plan
from nsp.engine.request import Request
from nsp.interventions import Intervention, apply, patch, scale
from nsp.metrics import Metric

# A model of at most this many layers is looked at at both ends.
_FEW = 4


def _off_if(wrong: bool, where: str) -> Off:
    return Off(float("inf") if wrong else 0.0, where)


# --- what is read -------------------------------------------------------------------------------------------------------


def shapes(bench: Bench) -> Iterator[Off]:
    geometry, length = bench.geometry, len(bench.base)
    for name in geometry.components():
        value = bench.whole(name)
        layers = 1 if name in ("embed", "logits") else len(geometry.layers_of(name))
        units = geometry.units(name)
        wanted = (layers, length, units.count, length if name == "pattern" else units.width)
        if tuple(value.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {wanted} (layer, position, unit, width)")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity")
    yield Off(None, f"{len(geometry.components())} components")


def logits(bench: Bench) -> Iterator[Off]:
    yield apart(bench.unchanged, bench.native(bench.base).logits[0], "logits")


def hidden_states(bench: Bench) -> Iterator[Off]:
    states = bench.native(bench.base, output_hidden_states=True).hidden_states
    if states is None:
        raise NotApplicable("transformers hands out no hidden states here")
    # Most models hand out what each layer receives, Mamba what each layer returns.
    received = apart(bench.value("resid_pre", 0)[:, 0], states[0][0], "").deviation or 0.0
    returned = apart(bench.value("resid_post", 0)[:, 0], states[0][0], "").deviation or 0.0
    name = "resid_pre" if received <= returned else "resid_post"
    for layer in range(bench.geometry.n_layers - (name == "resid_post")):
        yield apart(bench.value(name, layer)[:, 0], states[layer][0], f"{name}[{layer}]")
    yield apart(bench.whole("embed")[0], bench.value("resid_pre", 0), "embed")


def attentions(bench: Bench) -> Iterator[Off]:
    bench.need("pattern")
    with bench.runtime.attention("eager"):
        found = bench.native(bench.base, output_attentions=True).attentions
        (pattern,) = bench.run(["pattern"])
    if not found:
        raise NotApplicable("transformers hands out no attentions here")
    if len(found) == bench.geometry.n_layers:
        found = [found[layer] for layer in bench.geometry.layers_of("pattern")]
    for layer, native, mine in zip(bench.geometry.layers_of("pattern"), found, pattern, strict=True):
        yield apart(mine.transpose(0, 1), native[0], f"pattern[{layer}]")


# --- what adds up -------------------------------------------------------------------------------------------------------


def stream(bench: Bench) -> Iterator[Off]:
    if bench.geometry.table.stream:
        raise NotApplicable(bench.geometry.table.stream)
    bench.need("attn_out", "mlp_out")
    layers = bench.layers("attn_out", "mlp_out")
    for layer in layers:
        added = sum(bench.value(name, layer) for name in ("resid_pre", "attn_out", "mlp_out"))
        assert isinstance(added, torch.Tensor)
        yield apart(added, bench.value("resid_post", layer), f"layer {layer}")
    if len(layers) == bench.geometry.n_layers:
        total = bench.whole("embed")[0].double()
        for name in ("attn_out", "mlp_out"):
            total = total + bench.whole(name).double().sum(dim=0)
        yield apart(total, bench.value("resid_post", layers[-1]), "all layers")


def middle(bench: Bench) -> Iterator[Off]:
    bench.need("resid_mid", "attn_out")
    for layer in bench.layers("resid_mid", "attn_out"):
        added = bench.value("resid_pre", layer) + bench.value("attn_out", layer)
        yield apart(added, bench.value("resid_mid", layer), f"layer {layer}")


def output_projection(bench: Bench) -> Iterator[Off]:
    bench.need("z", "attn_out")
    yield from _projected(bench, "z", "attn_out")


def down_projection(bench: Bench) -> Iterator[Off]:
    bench.need("mlp_neurons", "mlp_out")
    where = bench.geometry.where("mlp_neurons")
    if where.side != "experts":
        yield from _projected(bench, "mlp_neurons", "mlp_out")
        return
    for layer in bench.layers("mlp_neurons"):
        experts = bench.module(layer, where.module)
        seen: list[tuple[Any, torch.Tensor]] = []
        hook = experts.register_forward_hook(lambda _module, given, made, seen=seen: seen.append((given, made)))
        try:
            bench.native(bench.base)
        finally:
            hook.remove()
        (_, routed, weights), made = seen[0]
        neurons = bench.value("mlp_neurons", layer)[..., 0].to(made)
        with torch.no_grad():
            found = expert_change(experts, neurons, routed, weights)
            if getattr(experts, "has_bias", False):
                found = found + _bias_of_experts(experts, routed, weights)
        yield apart(found, made, f"layer {layer}: the experts' output")


def _bias_of_experts(experts: Any, routed: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    bias: torch.Tensor = experts.down_proj_bias[routed]
    return (bias * weights[..., None].to(bias.dtype)).sum(dim=1)


def _projected(bench: Bench, inner: str, outer: str) -> Iterator[Off]:
    """The module that ``inner`` enters, and the post-norm where ``outer`` is taken after one."""
    start, end = bench.geometry.where(inner).module, bench.geometry.where(outer).module
    for layer in bench.layers(inner, outer):
        made = bench.through(start, bench.value(inner, layer).flatten(1), layer)
        if end != start and not start.startswith(f"{end}."):
            made = bench.through(end, made, layer)
        made = made * bench.geometry.residual_multiplier
        yield apart(made, bench.value(outer, layer)[:, 0], f"layer {layer}")


# --- which unit is which ------------------------------------------------------------------------------------------------


def heads(bench: Bench) -> Iterator[Off]:
    """A head of q moves its own z at its own position; one of k or v moves the z of its group from its position on, v linearly."""
    bench.need("q", "k", "v", "z")
    geometry = bench.geometry
    per_group = geometry.n_heads // geometry.n_kv_heads
    having = bench.layers("q", "k", "v", "z")
    # The layers of one model are alike; a small one can afford to see both ends.
    for layer in sorted({having[0], having[-1]}) if len(having) <= _FEW else [having[len(having) // 2]]:
        before = bench.value("z", layer)
        spread = float(before.std())
        for component in ("q", "k", "v"):
            count = geometry.n_heads if component == "q" else geometry.n_kv_heads
            own = later = 0.0
            for unit in sorted({0, count - 1}):
                name = f"{component}[{layer}][{unit}]"
                change = _moved_z(bench, apply(f"{name} @ {_HERE}", _reversed), layer).abs()
                mine = torch.zeros(before.shape[:2], dtype=torch.bool)
                if component == "q":
                    mine[_HERE, unit] = True
                else:
                    mine[_HERE:, unit * per_group : (unit + 1) * per_group] = True
                yield Off(float(change[~mine].max()) / spread, f"{name} moves z elsewhere")
                own = max(own, float(change[mine].max()))
                later = max(later, float(change[_HERE + 1 :].max()))
                if component == "v":
                    minus, double = (_moved_z(bench, scale(f"{name} @ {_HERE}", by), layer) for by in (-1.0, 2.0))
                    yield Off(float((minus + 2 * double).abs().max()) / spread, f"z is not linear in {name}")
            yield _off_if(own == 0.0, f"no head of {component}[{layer}] moves its own z")
            yield _off_if(component != "q" and later == 0.0, f"no head of {component}[{layer}] moves a later z")


_HERE = 2  # the position whose heads are changed


def _moved_z(bench: Bench, stated: Intervention, layer: int) -> torch.Tensor:
    """The change of z at one layer, (position, head, width)."""
    return bench.run([f"z[{layer}]"], stated)[0][0] - bench.value("z", layer)


def _reversed(value: torch.Tensor) -> torch.Tensor:
    # The same numbers in another order: a norm over all heads keeps its size, so other heads stay as they are.
    return value.flip(-1)


def gate(bench: Bench) -> Iterator[Off]:
    """A column of mlp_up or mlp_gate moves its own neuron; where there is a gate, the neuron is linear in mlp_up, not in mlp_gate."""
    bench.need("mlp_up", "mlp_neurons")
    gated = bench.has("mlp_gate")
    layer = bench.layers("mlp_up", "mlp_neurons")[-1]
    before = bench.value("mlp_neurons", layer)
    # The strongest neurons: those that an activation function has set to zero would say nothing.
    units = sorted(before[_HERE].abs().flatten().topk(3).indices.tolist())
    mine = torch.zeros_like(before, dtype=torch.bool)
    mine[_HERE, units] = True
    spread = max(float(before.std()), 1e-12)
    for component in ("mlp_gate", "mlp_up") if gated else ("mlp_up",):
        site = f"{component}[{layer}][{','.join(map(str, units))}] @ {_HERE}"
        after = bench.run([f"mlp_neurons[{layer}]"], scale(site, -1.0))[0][0]
        change = (after - before).abs()
        yield Off(float(change[~mine].max()) / spread, f"{site} moves other neurons")
        yield _off_if(float(change[mine].min()) == 0.0, f"{site} does not move its neurons")
        opposite = float((after + before)[mine].abs().max()) / spread
        if component == "mlp_up" and gated:
            yield Off(opposite, f"the neurons are not linear in {site}")
        else:
            yield _off_if(opposite == 0.0, f"no activation function acts on {site}")


# --- what is written ----------------------------------------------------------------------------------------------------


def _sites(bench: Bench) -> list[str]:
    """Every component that can be written, at all its layers, and the family's further modules at their last layer."""
    names = [name for name in bench.geometry.components() if name != "logits"]
    return [*names, *_module_sites(bench)]


def _module_sites(bench: Bench) -> list[str]:
    found = []
    for path in bench.geometry.table.modules:
        layers = [n for n in range(bench.geometry.n_layers) if _exists(bench, n, path)]
        found += [f"module:{bench.geometry.table.layers}.{layers[-1]}.{path}"] if layers else []
    return found


def _exists(bench: Bench, layer: int, path: str) -> bool:
    try:
        bench.module(layer, path)
    except AttributeError:
        return False
    return True


def _patched(bench: Bench, name: str, donor: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits without and with a patch; the pattern's both under eager attention, where alone it is made."""
    if name == "pattern":
        with bench.runtime.attention("eager"):
            return bench.logits(), bench.logits(patch(name, donor=donor), donor=donor)
    return bench.unchanged, bench.logits(patch(name, donor=donor), donor=donor)


def self_patch(bench: Bench) -> Iterator[Off]:
    for name in _sites(bench):
        before, after = _patched(bench, name, bench.base)
        yield Off(float((after - before).abs().max()), name)


def lands(bench: Bench) -> Iterator[Off]:
    for name in _sites(bench):
        before, after = _patched(bench, name, bench.donor)
        change = float((after - before).abs().max()) / float(before.std())
        if not change > bench.tolerance:
            raise ValueError(
                f"patching {name} from another prompt changes the logits by {change:.1e} of their spread: the write is lost"
            )
    yield Off(None, f"{len(_sites(bench))} sites")


def donor_logits(bench: Bench) -> Iterator[Off]:
    wanted = bench.logits(base=bench.donor)
    for layer in bench.some_layers:
        found = bench.logits(patch(f"resid_post[{layer}]", donor=bench.donor), donor=bench.donor)
        yield apart(found, wanted, f"resid_post[{layer}]")


# --- which path ---------------------------------------------------------------------------------------------------------


def branch_path(bench: Bench) -> Iterator[Off]:
    if bench.refusal:
        raise NotApplicable(f"plain path: {bench.refusal}")
    spread = float(bench.unchanged[-1].std())
    # One position in the middle, one near the end: windows and positions both count.
    positions = f"1,{len(bench.base) // 2},{len(bench.base) - 2}"
    for name in _sites(bench):
        axes: tuple[str, ...] = ("layer", "position")
        if name.startswith("module:") or name == "embed":
            site, axes = f"{name} @ {positions}", axes[1:]
        else:
            having = bench.geometry.layers_of(name)
            layers = sorted({having[0], having[len(having) // 2]})
            site = f"{name}[{','.join(map(str, layers))}] @ {positions}"
        found = [_swept(bench, site, axes, path) for path in ("branch", "plain")]
        yield Off(float(np.nanmax(np.abs(found[0] - found[1]))) / spread, name)


def _swept(bench: Bench, site: str, axes: tuple[str, ...], path: str) -> np.ndarray:
    token = bench.base.token_ids[0]
    request = Request(
        bases=(bench.base,),
        swept=(patch(site, donor=bench.donor),),
        axes=axes,
        metrics=(Metric("logit", (token,)),),
        tokens=(torch.tensor([[token]]),),
        path=path,
    )
    return measure(bench.runtime, plan(bench.runtime, request), bench.budget).values[0]


def batching(bench: Bench) -> Iterator[Off]:
    alone = {prompt: bench.logits(base=prompt) for prompt in (bench.base, bench.short)}
    together = bench.run(["logits"], bases=[bench.base, bench.short])[0]
    for row, prompt in enumerate((bench.base, bench.short)):
        yield apart(together[row, 0, : len(prompt), 0], alone[prompt], f"batched, {len(prompt)} tokens")
    padding = len(bench.base) - len(bench.short)
    rows = [bench.base.token_ids, (bench.base.token_ids[0],) * padding + bench.short.token_ids]
    mask = torch.ones(2, len(bench.base), dtype=torch.long)
    mask[1, :padding] = 0
    device = bench.runtime.device
    with torch.no_grad():
        found = bench.runtime.module(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0).to(device),
            use_cache=False,
        ).logits
    yield apart(found[1, padding:], alone[bench.short], "transformers, padded on the left")


def implementations(bench: Bench) -> Iterator[Off]:
    module: Any = bench.runtime.module
    if not bench.has("z"):
        raise NotApplicable(f"{bench.geometry.table.name} has no attention")
    if bench.geometry.table.eager:
        raise NotApplicable(bench.geometry.table.eager)
    if not getattr(module, "_supports_sdpa", False):
        raise NotApplicable("transformers has no sdpa implementation of it")
    found = []
    for name in ("sdpa", "eager"):
        with bench.runtime.attention(name):
            found.append(bench.logits())
    yield apart(found[0], found[1], "logits")


def generation(bench: Bench) -> Iterator[Off]:
    if bench.refusal:
        raise NotApplicable(f"nsp generates with keys and values: {bench.refusal}")
    steps, runtime = 8, bench.runtime
    branches = plan(runtime, Request((bench.base,)))
    mine = generate(runtime, branches, Decoding(max_new_tokens=steps, stop=False), bench.budget)[0]
    ids = torch.tensor([bench.base.token_ids], device=runtime.device)
    module: Any = runtime.module
    with torch.no_grad():
        made = module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps, min_new_tokens=steps,
            eos_token_id=None, pad_token_id=0, use_cache=True,
        )[0, ids.shape[1] :].cpu().numpy()  # fmt: skip
    yield Off(float((mine != made).sum()), f"tokens that differ, of {steps}")


LINES: tuple[tuple[str, Callable[[Bench], Iterator[Off]]], ...] = (
    ("every component has its shape", shapes),
    ("logits are transformers' own", logits),
    ("the residual stream is transformers' hidden states", hidden_states),
    ("the pattern is transformers' attentions", attentions),
    ("embed + attn_out + mlp_out rebuild the residual stream", stream),
    ("resid_mid is resid_pre + attn_out", middle),
    ("z through the output projection gives attn_out", output_projection),
    ("mlp_neurons through the down projection give mlp_out", down_projection),
    ("each head of q, k, v is that head's, and z follows", heads),
    ("each unit of mlp_gate and mlp_up is its neuron's", gate),
    ("patching a site with itself changes nothing, bit for bit", self_patch),
    ("patching a site from another prompt reaches the logits", lands),
    ("resid_post at all positions gives the donor's logits", donor_logits),
    ("branch path = plain path", branch_path),
    ("alone = batched = padded on the left", batching),
    ("sdpa = eager attention", implementations),
    ("generation without intervention is transformers' own", generation),
)
