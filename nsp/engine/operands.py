"""What an intervention writes: values from donors, vectors, noise, references and recordings, each as a `Source`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from nsp.datasets.alignment import Alignment
from nsp.datasets.prompts import Prompt, encode
from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.engine.branches import Bases, Ints, Source
from nsp.engine.lowering import Operand, Resolved
from nsp.engine.recording import Recording, record
from nsp.engine.runtime import Runtime
from nsp.engine.slots import Slot
from nsp.errors import InputError
from nsp.interventions import Ablate, Apply, Inject, Intervention, Noise, Patch, Scale


def needed_slots(item: Resolved) -> set[Slot]:
    """The slots whose values an intervention's donor must keep."""
    return {(item.slot_component, layer) for layer in item.slot_layers}


def make_operand(
    runtime: Runtime,
    intervention: Intervention,
    item: Resolved,
    prompts: Sequence[Prompt],
    donor: Source | None = None,
) -> Operand:
    """What an intervention writes; ``donor`` has the values of a patch from prompts."""
    if isinstance(intervention, Patch):
        return Operand("set", donor or recorded_source(runtime, item, intervention.donor, prompts))
    if item.slot_component == "pattern" and not (
        isinstance(intervention, Scale) or (isinstance(intervention, Ablate) and intervention.kind == "zero")
    ):
        raise InputError(
            f"{item.site}: the attention pattern can be patched, scaled and ablated to zero, not {intervention.op}ed"
        )
    if isinstance(intervention, Scale):
        return Operand("scale", factor=intervention.factor)
    if isinstance(intervention, Apply):
        return Operand("apply", function=intervention.function)
    if isinstance(intervention, Inject):
        kind = "add" if intervention.mode == "add" else "set"
        if isinstance(intervention.vector, Noise):
            noise = intervention.vector
            source = _noise_source(runtime, item, prompts, noise.scale, noise.seed)
        else:
            source = _vector_source(runtime, item, intervention.vector.to(runtime.device))
        return Operand(kind, source, factor=intervention.coefficient)
    if intervention.kind == "zero":
        return Operand("scale", factor=0.0)
    if intervention.kind == "direction":
        return Operand("project", _direction_source(runtime, item, intervention))
    if intervention.kind == "noise":
        return Operand("set", _noise_source(runtime, item, prompts, intervention.scale, intervention.seed))
    if isinstance(intervention.reference, xr.DataArray):
        return Operand("set", recorded_source(runtime, item, intervention.reference, prompts))
    return Operand("set", _reference_source(runtime, intervention, item, prompts))


def _direction_source(runtime: Runtime, item: Resolved, ablation: Ablate) -> Source:
    """The directions of a projection, scaled to length 1 in float64."""
    assert ablation.direction is not None
    if item.units is None and item.rows > 1:
        raise InputError(f"{item.site}: a direction is taken out of a whole vector; name heads, such as {item.site.component}[3][1]")
    wide = ablation.direction.double()
    return _vector_source(runtime, item, (wide / wide.norm(dim=-1, keepdim=True)).float().to(runtime.device))


def _tensor_width(runtime: Runtime, item: Resolved) -> int:
    units = runtime.units(item.site.component)
    return units.rows * units.width


def _vector_source(runtime: Runtime, item: Resolved, vector: torch.Tensor) -> Source:
    """A vector of the site's (or one unit's) width, or one for each of the site's positions, (position, width), or for
    each base prompt, (base, 1 or position, width).
    """
    units = runtime.units(item.site.component)
    whole = units.width if item.units is not None else len(units.index) * units.width
    counts = {len(positions) for positions in item.positions}
    fits = vector.dim() in (1, 2, 3) and vector.shape[-1] == whole
    if fits and vector.dim() > 1:
        fits = counts == {vector.shape[-2]} or (vector.dim() == 3 and vector.shape[1] == 1)
        fits = fits and (vector.dim() == 2 or vector.shape[0] == len(item.positions))
    if not fits:
        many = (
            f"({counts.pop()}, {whole})"
            if len(counts) == 1
            else f"(position, {whole}) where all prompts select as many positions"
        )
        raise InputError(
            f"{item.site}: the vector has shape {tuple(vector.shape)}; the site takes ({whole},) or {many}, or one for each base "
            f"prompt, ({len(item.positions)}, 1, {whole})"
        )
    rows = vector.reshape(-1, whole)
    full = rows.repeat(1, units.rows) if item.units is not None else _widened(units, rows)
    if vector.dim() == 1:
        return Source(lambda _slot: full[None])
    if vector.dim() == 3:
        each = full.reshape(vector.shape[0], vector.shape[1], -1)
        places = None if vector.shape[1] == 1 else tuple(_index_map(at, range(len(at))) for at in item.positions)
        return Source(lambda _slot: each, np.arange(len(each)), places)
    return Source(lambda _slot: full[None], None, tuple(_index_map(at, range(len(at))) for at in item.positions))


def _noise_source(runtime: Runtime, item: Resolved, prompts: Sequence[Prompt], scale: float, seed: int) -> Source:
    width, longest = _tensor_width(runtime, item), max(len(prompt) for prompt in prompts)

    def draw(slot: Slot) -> torch.Tensor:
        # One generator a position: the draw depends on seed, site and position alone, so packing and batching cannot
        # change it.
        rows = []
        for position in range(longest):
            name = f"{seed}:{slot[0]}:{slot[1]}:{position}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
            rows.append(torch.randn(width, generator=generator))
        return (torch.stack(rows) * (scale * runtime.embedding_deviation))[None].to(runtime.device)

    return Source(draw)


def _reference_source(runtime: Runtime, ablation: Ablate, item: Resolved, prompts: Sequence[Prompt]) -> Source:
    assert not isinstance(ablation.reference, xr.DataArray)
    given = NEUTRAL_SENTENCES if ablation.reference is None else ablation.reference
    reference = [encode(runtime.tokenizer, prompt) for prompt in given]
    lengths = {len(prompt) for prompt in [*reference, *prompts]}
    if ablation.over == "prompts" and len(lengths) > 1:
        raise InputError(
            f"ablate over='prompts' compares equal positions, so reference and base prompts must have one length; got {sorted(lengths)} "
            "tokens (over='tokens' has no such need)"
        )
    longest = max(len(prompt) for prompt in prompts)

    @functools.cache
    def recorded() -> Recording:
        return record(runtime, reference, needed_slots(item), stay=True)

    @functools.cache
    def values(slot: Slot) -> torch.Tensor:
        stored = recorded().values[slot]
        real = recorded().real.to(stored.device)
        if ablation.kind == "mean":
            if ablation.over == "prompts":
                return stored.float().mean(dim=0, keepdim=True)
            return stored[real].float().mean(dim=0)[None, None, :]
        generator = torch.Generator().manual_seed(ablation.seed)
        if ablation.over == "prompts":
            choice = torch.randint(len(reference), (longest,), generator=generator)
            return stored[choice.to(stored.device), torch.arange(longest, device=stored.device)][None]
        tokens = stored[real]
        choice = torch.randint(len(tokens), (longest,), generator=generator)
        return tokens[choice.to(stored.device)][None]

    return Source(values)


def recorded_source(
    runtime: Runtime, item: Resolved, recording: xr.DataArray | torch.Tensor, prompts: Sequence[Prompt]
) -> Source:
    """The source of a patch from a plain tensor (see `_vector_source`) or a labelled recording.

    A recording has dims (layer, position, neuron), (layer, position, head, neuron) or, for the pattern, (layer,
    position, head, sender), as traces record them, and must hold the site's layers, positions and units.
    """
    if isinstance(recording, torch.Tensor):
        value = recording.to(runtime.device)
        return _vector_source(runtime, item, value[0] if value.dim() == 3 and value.shape[0] == 1 else value)
    array = _chosen_units(runtime, item, recording)
    if "layer" in array.dims:
        _require_labels(item, "layer", item.layers, array["layer"].values.tolist())
    held = _held_positions(item, array)
    for positions in item.positions:
        _require_labels(item, "position", positions, held if held is not None else list(positions))
    layer_of = dict(zip(item.slot_layers, item.layers, strict=True))
    labels = [dim for dim in ("layer", "position") if dim in array.dims]
    ordered = array.transpose(*labels, ...)
    units = runtime.units(item.site.component)

    def values(slot: Slot) -> torch.Tensor:
        chosen = ordered.sel(layer=layer_of[slot[1]]) if "layer" in labels else ordered
        tensor = torch.as_tensor(np.ascontiguousarray(chosen.values)).to(runtime.device)
        if "position" not in labels:
            tensor = tensor[None]
        number = list(item.units) if item.units is not None else list(range(len(units.index)))
        if slot[0] == "pattern":
            full = torch.zeros(
                len(units.index), tensor.shape[0], tensor.shape[-1], dtype=tensor.dtype, device=tensor.device
            )
            full[torch.as_tensor(number)] = tensor.transpose(0, 1)
            return full[None]
        full = torch.zeros(tensor.shape[0], units.rows, units.width, dtype=tensor.dtype, device=tensor.device)
        full[:, torch.as_tensor([units.index[one] for one in number])] = tensor.reshape(
            tensor.shape[0], len(number), units.width
        )
        return full.reshape(1, tensor.shape[0], -1)

    index = None if held is None else tuple(_index_map(held, range(len(held))) for _ in prompts)
    return Source(values, None, index)


def _chosen_units(runtime: Runtime, item: Resolved, array: xr.DataArray) -> xr.DataArray:
    """The recording with just the site's heads or neurons; an InputError where its widths or units do not fit."""
    units = runtime.units(item.site.component)
    name = item.site.spec.unit
    wanted = list(item.units) if item.units is not None else list(range(len(units.index)))
    if name is not None and name in array.dims:
        labels = array[name].values.tolist() if name in array.coords else list(range(array.sizes[name]))
        _require_labels(item, name, wanted, labels)
        array = array.isel({name: [labels.index(one) for one in wanted]})
    rest = [dim for dim in array.dims if dim not in ("layer", "position")]
    if item.slot_component == "pattern":
        return array
    width, whole = int(np.prod([array.sizes[dim] for dim in rest])), len(wanted) * units.width
    if width != whole:
        raise InputError(
            f"{item.site}: the recording is {width} wide, the site {whole}; models of different widths need a map"
        )
    return array


def _held_positions(item: Resolved, array: xr.DataArray) -> list[int] | None:
    """The token positions that a recording holds, or None where it holds one value for all."""
    if "position" not in array.dims:
        return None
    label = array["token_position"] if "token_position" in array.coords else array["position"]
    if label.ndim != 1:
        raise InputError(
            f"{item.site}: the recording holds several prompts; select one, for example donor=recording.isel(prompt=0)"
        )
    return [int(position) for position in label.values]


def _require_labels(item: Resolved, what: str, wanted: Sequence[int], held: Sequence[int]) -> None:
    missing = sorted(set(wanted) - set(held))
    if missing:
        raise InputError(f"{item.site}: the recording has no {what} {missing[0]}; it has {list(held)}")


def _widened(units: object, value: torch.Tensor) -> torch.Tensor:
    """Place a component's own width into the width of the tensor that it shares with others: (position, tensor width).
    """
    rows, width, index = units.rows, units.width, units.index  # type: ignore[attr-defined]
    full = torch.zeros(value.shape[0], rows, width, dtype=value.dtype, device=value.device)
    full[:, torch.as_tensor(index)] = value.reshape(value.shape[0], len(index), width)
    return full.reshape(value.shape[0], -1)


def _index_map(positions: Sequence[int], places: Sequence[int]) -> Ints:
    size = max(positions, default=0) + 1
    result = np.full(size, -1, dtype=np.int64)
    result[list(positions)] = list(places)
    return result


def prompt_source(bases: Bases, donors: Sequence[Prompt], alignments: Sequence[Alignment]) -> Source:
    """The source of a patch from prompts that run beside the bases, one for each."""
    return Source(bases.value, bases.runs_of(donors), position_maps(alignments), beside=True)


def position_maps(alignments: Sequence[Alignment]) -> tuple[Ints, ...] | None:
    """For each base, base position -> donor position (-1 where it has none); None where all are their own."""
    maps = []
    for alignment in alignments:
        table = np.full(alignment.base_length, -1, dtype=np.int64)
        pairs = np.array(alignment.base_to_donor, dtype=np.int64).reshape(-1, 2)
        table[pairs[:, 0]] = pairs[:, 1]
        maps.append(table)
    every = np.concatenate(maps)
    own = np.concatenate([np.arange(len(table)) for table in maps])
    return None if bool((every == own).all()) else tuple(maps)
