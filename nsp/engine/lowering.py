"""From interventions and prompts to branches: selectors resolved, sources found, exact zeros pruned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from nsp.datasets.alignment import Alignment, align
from nsp.datasets.prompts import Prompt, encode
from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.engine.branches import BranchTable, Ints, Source, Writes, drop_unfelt
from nsp.engine.capture import Capture, Slot, capture, slot_of
from nsp.engine.runtime import MODULE, Runtime
from nsp.errors import InputError
from nsp.interventions import Ablate, Apply, Inject, Intervention, Noise, Patch, Scale
from nsp.sites import COMPONENTS, Site

AXES = ("layer", "position", "unit")


@dataclass(frozen=True)
class Resolved:
    """A site on one model: concrete layers (boundaries for the residual stream), positions per base, and unit rows.

    Attributes:
        slot_component: the component, or ``boundary`` for the three names of the residual stream between layers.
        layers: the layer numbers as the user counts them; ``slot_layers`` where their values are kept.
        positions: one tuple a base prompt.
        units: the unit numbers, or None where the site names none (the whole component).
        unit_rows: (unit, row) the rows of the tensor that each unit occupies; one row group for the whole component.
        rows: how many unit rows the tensor's last axis is split into.
    """

    site: Site
    slot_component: str
    layers: tuple[int, ...]
    slot_layers: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]
    units: tuple[int, ...] | None
    unit_rows: Ints
    rows: int


def resolve(runtime: Runtime, site: Site, prompts: Sequence[Prompt]) -> Resolved:
    """Resolve a site against a model and prompts; every index out of range is an error that names the valid range."""
    geometry = runtime.geometry
    component = site.component
    if component.startswith(MODULE):
        layers: tuple[int, ...] = (runtime.module_layer(component),)
    elif component == "logits":
        layers = (geometry.n_layers,)
    elif not COMPONENTS[component].layered:
        layers = (0,)
    else:
        if component not in geometry.components():
            geometry.where(component)
        # "*" is every layer that has the component; hybrid models have attention in some layers only.
        everywhere = site.layers is None or site.layers.everything
        layers = geometry.layers_of(component) if everywhere else site.layers.resolve(  # type: ignore[union-attr]
            geometry.n_layers, what=f"layer of {site}"
        )  # fmt: skip
        geometry.require(component, layers)
    slots = [slot_of(component, layer, geometry.n_layers) for layer in layers]
    units = runtime.units(component)
    chosen: tuple[int, ...] | None = None
    if site.units is not None:
        if not component.startswith(MODULE) and COMPONENTS[component].unit is None:
            raise InputError(f"{site}: {component} has no heads or neurons; write {component}[layers] @ positions")
        kind = "neuron" if component.startswith(MODULE) else COMPONENTS[component].unit
        chosen = site.units.resolve(units.count, what=f"{kind} of {site}")
        rows, unit_rows = units.rows, np.array([[units.index[unit]] for unit in chosen], dtype=np.int64)
    elif component == "pattern" or units.count != units.rows:
        # Heads of the pattern, and components that share a tensor with others, are written row by row.
        rows, unit_rows = units.rows, np.array([list(units.index)], dtype=np.int64)
    else:
        rows, unit_rows = 1, np.zeros((1, 1), dtype=np.int64)
    positions = tuple(tuple(prompt.positions(site.positions)) for prompt in prompts)
    return Resolved(site, slots[0][0], layers, tuple(slot[1] for slot in slots), positions, chosen, unit_rows, rows)


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep for every base: which axes are swept, and their sizes.

    ``sizes`` has one (layer, position, unit) triple a base, with 1 where an axis is not swept; ``offsets`` is the
    first branch of each base.
    """

    swept: tuple[str, ...]
    sizes: tuple[tuple[int, int, int], ...]

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(a * b * c for a, b, c in self.sizes)

    @property
    def offsets(self) -> Ints:
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The padded (layer, position, unit) shape that holds every base."""
        return tuple(int(size) for size in np.max(self.sizes, axis=0))  # type: ignore[return-value]

    def scatter(self, values: np.ndarray) -> np.ndarray:
        """Values with axis (branch) as (base, layer, position, unit), NaN where a base has no such cell."""
        result = np.full((len(self.sizes), *self.shape), np.nan, dtype=np.float32)
        for base, (low, size) in enumerate(zip(self.offsets, self.sizes, strict=False)):
            block = values[low : low + size[0] * size[1] * size[2]].reshape(size)
            result[base, : size[0], : size[1], : size[2]] = block
        return result


def grid_of(swept: Sequence[Resolved], axes: Sequence[str], bases: int) -> Grid:
    """The grid of a sweep; several swept interventions move together, so their axes must agree in size."""
    if not swept:
        return Grid((), tuple((1, 1, 1) for _ in range(bases)))
    sizes = []
    for base in range(bases):
        each = {tuple(_axis_size(item, axis, base) if axis in axes else 1 for axis in AXES) for item in swept}
        if len(each) > 1:
            raise InputError(
                "interventions swept together must select the same number of layers, positions and units; "
                f"got {sorted(each)} for {', '.join(str(item.site) for item in swept)}"
            )
        sizes.append(each.pop())
    return Grid(tuple(axes), tuple(sizes))  # type: ignore[arg-type]


def _axis_size(item: Resolved, axis: str, base: int) -> int:
    return {"layer": len(item.layers), "position": len(item.positions[base]), "unit": len(item.unit_rows)}[axis]


@dataclass(frozen=True, eq=False)
class Operand:
    """How one intervention's writes are done: the step kind, the source of values, the prompts' alignment to a donor.
    """

    kind: str
    source: Source | None = None
    factor: float = 1.0
    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    alignments: tuple[Alignment, ...] | None = None


def write_columns(
    item: Resolved, operand: Operand, grid: Grid, base_count: int, *, moving: bool, cumulative: bool = False
) -> Writes:
    """All writes of one intervention over all branches. ``moving``: it is swept; else it is stated in every branch.

    ``cumulative``: the branch of a layer has the writes of the layers before it too.
    """
    axes = grid.swept if moving else ()
    columns: dict[str, list[Ints]] = {name: [] for name in ("branch", "layer", "position", "unit")}
    for base in range(base_count):
        layer, place, unit, row = (
            axis.reshape(-1)
            for axis in np.meshgrid(
                np.arange(len(item.slot_layers)),
                np.arange(len(item.positions[base])),
                np.arange(len(item.unit_rows)),
                np.arange(item.unit_rows.shape[1]),
                indexing="ij",
            )
        )
        size = grid.sizes[base]
        target = layer
        if cumulative and "layer" in axes:
            repeated = len(item.slot_layers) - layer
            target = np.concatenate([np.arange(first, len(item.slot_layers)) for first in layer] or [layer])
            layer, place, unit, row = (np.repeat(axis, repeated) for axis in (layer, place, unit, row))
        cell = np.zeros_like(layer)
        for axis, index, extent in zip(AXES, (target, place, unit), size, strict=True):
            cell = cell * extent + (index if axis in axes else 0)
        layers = np.asarray(item.slot_layers)[layer]
        positions = np.asarray(item.positions[base], dtype=np.int64)[place]
        units = item.unit_rows[unit, row]
        repeats = 1 if moving else grid.counts[base]
        branch = np.repeat(np.arange(repeats), len(cell)) + np.tile(cell, repeats)
        columns["branch"].append(branch + grid.offsets[base])
        for name, values in (("layer", layers), ("position", positions), ("unit", units)):
            columns[name].append(np.tile(values, repeats))
    joined = {name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()}
    return Writes(
        item.slot_component, operand.kind, item.rows, joined["branch"], joined["layer"], joined["position"], joined["unit"],
        operand.source, operand.factor, operand.function, str(item.site),
    )  # fmt: skip


def prune_shared_prefix(writes: Writes, operand: Operand, base: Ints) -> Writes:
    """Drop patches of positions where donor and base share every token up to there: attention is causal, so the values
    are equal.
    """
    if operand.alignments is None:
        return writes
    shared = np.array([alignment.shared_prefix for alignment in operand.alignments])
    return writes.where(writes.position >= shared[base[writes.branch]])


def build_table(
    runtime: Runtime,
    prompts: Sequence[Prompt],
    resolved: Sequence[tuple[Resolved, Operand, bool]],
    grid: Grid,
    measured: Sequence[frozenset[int]],
    *,
    prune: bool,
    cumulative: bool = False,
) -> BranchTable:
    """Every branch, with what cannot matter pruned where asked. ``measured``: the positions measured, one set a base.
    """
    base = np.repeat(np.arange(len(prompts)), grid.counts)
    end = np.array([max(positions) + 1 for positions in measured])[base]
    alone = len(resolved) == 1
    columns = []
    for item, operand, moving in resolved:
        writes = write_columns(item, operand, grid, len(prompts), moving=moving, cumulative=cumulative)
        if prune and alone:
            writes = prune_shared_prefix(writes, operand, base)
        if prune:
            writes = drop_unfelt(writes, runtime.geometry.n_layers, list(measured), base)
        columns.append(writes)
    return BranchTable(base, end, runtime.geometry.n_layers, columns)


# --- operands -------------------------------------------------------------------------------------------------------


def needed_slots(item: Resolved) -> set[Slot]:
    """The slots whose values an intervention's donor must keep."""
    return {(item.slot_component, layer) for layer in item.slot_layers}


def make_operand(
    runtime: Runtime,
    intervention: Intervention,
    item: Resolved,
    prompts: Sequence[Prompt],
    donors: Callable[[Patch, Resolved], tuple[Source, tuple[Alignment, ...] | None]],
) -> Operand:
    """What an intervention writes; ``donors`` runs the donor prompts of a patch."""
    if isinstance(intervention, Patch):
        source, alignments = donors(intervention, item)
        if (
            item.slot_component == "pattern"
            and alignments is not None
            and any(one.base_length != one.donor_length for one in alignments)
        ):
            raise InputError(
                f"{item.site}: a pattern spans all key positions, so donor and base must have equally many tokens"
            )
        return Operand("set", source, alignments=alignments)
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
    deviation = runtime.embedding_deviation

    def draw(slot: Slot) -> torch.Tensor:
        # One generator a position: the draw depends on seed, site and position alone, so packing and batching cannot
        # change it.
        rows = []
        for position in range(longest):
            name = f"{seed}:{slot[0]}:{slot[1]}:{position}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
            rows.append(torch.randn(width, generator=generator))
        return (torch.stack(rows) * (scale * deviation))[None].to(runtime.device)

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
    kept: Capture = capture(runtime, [prompt.token_ids for prompt in reference], needed_slots(item), stay=True)
    real = torch.arange(kept.ids.shape[1])[None, :] < kept.lengths[:, None]
    longest = max(len(prompt) for prompt in prompts)

    def values(slot: Slot) -> torch.Tensor:
        stored = kept.values[slot]
        if ablation.kind == "mean":
            if ablation.over == "prompts":
                return stored.float().mean(dim=0, keepdim=True)
            return stored[real.to(stored.device)].float().mean(dim=0)[None, None, :]
        generator = torch.Generator().manual_seed(ablation.seed)
        if ablation.over == "prompts":
            choice = torch.randint(len(reference), (longest,), generator=generator)
            return stored[choice.to(stored.device), torch.arange(longest, device=stored.device)][None]
        tokens = stored[real.to(stored.device)]
        choice = torch.randint(len(tokens), (longest,), generator=generator)
        return tokens[choice.to(stored.device)][None]

    cache: dict[Slot, torch.Tensor] = {}
    return Source(lambda slot: cache[slot] if slot in cache else cache.setdefault(slot, values(slot)))


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
    name = "neuron" if item.site.component.startswith(MODULE) else COMPONENTS[item.site.component].unit
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


def prompt_source(kept: Capture, run: Ints, alignments: Sequence[Alignment]) -> Source:
    """The source of a patch from donor prompts that have been run; ``run`` is the donor of each base."""
    maps = []
    for alignment in alignments:
        table = np.full(alignment.base_length, -1, dtype=np.int64)
        for here, there in alignment.base_to_donor:
            table[here] = there
        maps.append(table)
    identity = all((table == np.arange(len(table))).all() for table in maps)
    return Source(lambda slot: kept.values[slot], run, None if identity else tuple(maps))


def align_all(prompts: Sequence[Prompt], donors: Sequence[Prompt], site: Site) -> tuple[Alignment, ...]:
    """The alignment of each base with its donor at the site's positions."""
    return tuple(align(base, donor, site.positions) for base, donor in zip(prompts, donors, strict=True))
