"""A site on a model and its prompts: concrete layers, positions and units, and the writes of an intervention there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Cells, Ints, Source, Writes
from nsp.engine.runtime import Runtime
from nsp.engine.slots import Slot, slot_of
from nsp.errors import InputError
from nsp.sites import Site

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


def site_layers(runtime: Runtime, site: Site) -> tuple[int, ...]:
    """The layers of a site on a model; an index out of range is an error that names the valid range."""
    geometry, component, known = runtime.geometry, site.component, site.spec
    if known.is_module:
        return (runtime.module_layer(component),)
    if component == "logits":
        return (geometry.n_layers,)
    if not known.layered:
        return (0,)
    if component not in geometry.components():
        geometry.where(component)
    if site.layers is None or site.layers.everything:
        # Every layer that has the component; hybrid models have attention in some layers only.
        layers = geometry.layers_of(component)
    else:
        layers = site.layers.resolve(geometry.n_layers, what=f"layer of {site}")
    geometry.require(component, layers)
    return layers


def site_slots(runtime: Runtime, sites: Iterable[str | Site | Slot]) -> list[Slot]:
    """The slots of sites, given as selectors, sites or slots; what they say of positions and units is left aside."""
    slots: list[Slot] = []
    for given in sites:
        if isinstance(given, tuple):
            slots.append(given)
            continue
        site = Site.parse(given) if isinstance(given, str) else given
        slots += [slot_of(site.component, layer) for layer in site_layers(runtime, site)]
    return slots


def resolve(runtime: Runtime, site: Site, prompts: Sequence[Prompt]) -> Resolved:
    """Resolve a site against a model and prompts; every index out of range is an error that names the valid range."""
    component, layers = site.component, site_layers(runtime, site)
    slots = [slot_of(component, layer) for layer in layers]
    units = runtime.units(component)
    chosen: tuple[int, ...] | None = None
    if site.units is not None:
        chosen = site.units.resolve(units.count, what=f"{site.spec.unit} of {site}")
        rows, unit_rows = units.rows, np.array([[units.index[unit]] for unit in chosen], dtype=np.int64)
    elif component == "pattern" or units.count != units.rows:
        # Heads of the pattern, and components that share a tensor with others, are written row by row.
        rows, unit_rows = units.rows, np.array([list(units.index)], dtype=np.int64)
    else:
        rows, unit_rows = 1, np.zeros((1, 1), dtype=np.int64)
    positions = tuple(tuple(prompt.positions(site.positions)) for prompt in prompts)
    return Resolved(site, slots[0][0], layers, tuple(slot[1] for slot in slots), positions, chosen, unit_rows, rows)


def cells_of(swept: Sequence[Resolved], axes: Sequence[str], bases: int) -> Cells:
    """The cells of a sweep; several swept interventions move together, so their axes must agree in size."""
    if not swept:
        return Cells((), ((1, 1, 1),) * bases)
    sizes = [_sizes(swept[0], axes, base) for base in range(bases)]
    for item in swept[1:]:
        for base, size in enumerate(sizes):
            if _sizes(item, axes, base) != size:
                each = sorted({_sizes(item, axes, base) for item in swept})
                raise InputError(
                    "interventions swept together must select the same number of layers, positions and units; "
                    f"got {each} for {', '.join(str(item.site) for item in swept)}"
                )
    return Cells(tuple(axes), tuple(sizes))


def _sizes(item: Resolved, axes: Sequence[str], base: int) -> tuple[int, int, int]:
    """The (layer, position, unit) cells that an item has for one base, 1 where an axis is not swept."""
    sizes = len(item.layers), len(item.positions[base]), len(item.unit_rows)
    layer, position, unit = (size if axis in axes else 1 for axis, size in zip(AXES, sizes, strict=True))
    return layer, position, unit


@dataclass(frozen=True, eq=False)
class Operand:
    """How one intervention's writes are done (see `Writes`): the step kind, the source of values, a factor or a function."""

    kind: str
    source: Source | None = None
    factor: float = 1.0
    function: Callable[[torch.Tensor], torch.Tensor] | None = None


def write_columns(
    item: Resolved, operand: Operand, cells: Cells, *, moving: bool, cumulative: bool = False
) -> Writes:
    """All writes of one intervention over all branches. ``moving``: it is swept; else it is stated in every branch.

    ``cumulative``: the branch of a layer has the writes of the layers before it too.
    """
    axes = cells.swept if moving else ()
    columns: dict[str, list[Ints]] = {name: [] for name in ("branch", "layer", "position", "unit")}
    for base, size in enumerate(cells.sizes):
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
        repeats = 1 if moving else cells.counts[base]
        branch = np.repeat(np.arange(repeats), len(cell)) + np.tile(cell, repeats)
        columns["branch"].append(branch + cells.offsets[base])
        for name, values in (("layer", layers), ("position", positions), ("unit", units)):
            columns[name].append(np.tile(values, repeats))
    joined = {name: np.concatenate(parts).astype(np.int64) for name, parts in columns.items()}
    return Writes(
        item.slot_component, operand.kind, item.rows, joined["branch"], joined["layer"], joined["position"], joined["unit"],
        operand.source, operand.factor, operand.function, str(item.site),
    )  # fmt: skip
