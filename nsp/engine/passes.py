"""The branch path and the plain path: a `Pass` (or a batch of whole rows) lowered to a `Program`.

Branch path: the changed suffixes of many branches lie side by side in rows; each token carries its own position,
    and a 4-D mask lets it
see the trunk's keys and values before its branch's start and its own branch's earlier tokens, nothing else. Layers
below the first join are skipped, and rows join at the layer where their branches start with the trunk's hidden states.

Plain path: one row a branch, the whole prompt, every layer. The reference for every model, and the fallback.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from nsp.engine.branches import Branches, Held, Ints, Writes
from nsp.engine.forward_pass import empty_entry, ordered_visits, plain_inputs, program_of, visit_of, whole_read
from nsp.engine.masks import layer_masks
from nsp.engine.pack import Pass
from nsp.engine.program import LayerEntry, Outputs, Program, Readout, Step, Visit
from nsp.engine.readout import build_readout
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot
from nsp.sites import component

if TYPE_CHECKING:
    from nsp.engine.recording import Recording


@dataclass(frozen=True, eq=False)
class Lowered:
    """A program and what its outputs belong to.

    Attributes:
        branches: the branches it runs, in the order of its readouts.
        norm_branches: for each write step, in the program's order, (the intervention's number, the branch of each
            write).
        streams: for each read of the residual stream, in the program's order, (the measure's number, which of
            ``branches`` it reads).
        reads: for each read, in the program's order, the slot that it reads whole, or None where it is one of ``streams``;
            None where all are.
    """

    program: Program
    branches: Ints
    norm_branches: list[tuple[int, Ints]]
    streams: list[tuple[int, Ints]]
    reads: list[Slot | None] | None = None

    def stream_reads(self, outputs: Outputs) -> list[torch.Tensor]:
        """What the program read of the residual stream for measures."""
        if self.reads is None:
            return outputs["reads"]
        return [value for slot, value in zip(self.reads, outputs["reads"], strict=True) if slot is None]

    def values(self, outputs: Outputs) -> dict[Slot, torch.Tensor]:
        """What the program read whole, by slot."""
        return {slot: value for slot, value in zip(self.reads or (), outputs["reads"], strict=True) if slot is not None}


class Places:
    """Row and column of any (branch, position) of one pass; without ``columns`` every position lies in column 0."""

    def __init__(self, branches: Branches, chosen: Ints, rows: Ints, columns: Ints | None) -> None:
        self.row = np.full(len(branches), -1)
        self.row[chosen] = rows
        self.shift = np.zeros(len(branches), dtype=np.int64)
        self.moving = columns is not None
        if columns is not None:
            self.shift[chosen] = columns

    def column(self, branch: Ints, position: Ints) -> Ints:
        """The column of each (branch, position)."""
        return self.shift[branch] + position if self.moving else np.zeros_like(position)


def lower_pass(runtime: Runtime, branches: Branches, packed: Pass) -> Lowered:
    """Lower one packed pass of the branch path."""
    device, n_layers, trunk = runtime.device, runtime.geometry.n_layers, _trunk_of(branches)
    count, past = len(packed.rows), packed.past
    laid = laid_out(branches, packed)
    chosen, joins, places = laid.branches, laid.joins, laid.places(branches)
    bases = torch.as_tensor(laid.bases, device=device)
    start = int(joins[0])
    at = torch.as_tensor(laid.positions, device=device)
    ids = trunk.ids[bases[:, None], at]
    cache = DynamicCache()
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": pass_mask(runtime, laid.owner, laid.begin, laid.positions, past),
        "position_ids": at,
        "past_key_values": cache,
        "use_cache": True,
    }

    def joining(layer: int) -> torch.Tensor | None:
        new = torch.as_tensor(np.flatnonzero(joins == layer), device=device)
        if len(new) == 0:
            return None
        return trunk.values[(BOUNDARY, layer)][bases[new][:, None], at[new]]

    first = joining(start)
    layers: list[LayerEntry] = []
    for layer in range(start, n_layers):
        active = int((joins <= layer).sum())
        entry = empty_entry(runtime, layer, active)
        # The first layer gets its input from here: layers that return tuples, once skipped, hand on something else.
        entry["join"] = (first if start else None) if layer == start else joining(layer)
        entry["keys"] = _rows_of(trunk.keys[layer], bases[:active])[:, :, :past]
        entry["values"] = _rows_of(trunk.cached_values[layer], bases[:active])[:, :, :past]
        layers.append(entry)
    final = empty_entry(runtime, n_layers, count)
    final["join"] = None if start == n_layers else joining(n_layers)
    norm_branches = place_writes(runtime, branches, [*layers, final], chosen, places, past)
    streams = _read_streams(runtime, [*layers, final], branches, chosen, places)
    readout = _readout(runtime, branches, chosen, places)
    program = program_of(runtime, inputs, [*layers, final], readout, first=first)
    trim_last(runtime, program, branches)
    return Lowered(program, chosen, norm_branches, streams)


def lower_plain(runtime: Runtime, branches: Branches, chosen: Ints, slots: Collection[Slot] = ()) -> Lowered:
    """Lower a batch of branches of the plain path, one row for each of ``chosen``, whole prompts; ``slots`` are read whole."""
    trunk, base = _trunk_of(branches), torch.as_tensor(branches.base[chosen])
    lengths = trunk.lengths[base]
    ids = trunk.ids[base.to(runtime.device), : int(lengths.max())]
    return lower_rows(runtime, branches, chosen, ids, lengths, slots)


def lower_rows(
    runtime: Runtime, branches: Branches, chosen: Ints, ids: torch.Tensor, lengths: torch.Tensor, slots: Collection[Slot] = ()
) -> Lowered:
    """The same for the padded prompts of the chosen branches: ``ids`` (row, position) and their ``lengths`` (row,)."""
    rows = len(chosen)
    places = Places(branches, chosen, np.arange(rows), np.zeros(rows, dtype=np.int64))
    entries = [empty_entry(runtime, layer, rows) for layer in range(runtime.geometry.n_layers + 1)]
    reads = {slot: whole_read() for slot in slots}
    norm_branches = place_writes(runtime, branches, entries, chosen, places, None, reads=reads)
    streams = _read_streams(runtime, entries, branches, chosen, places)
    readout = _readout(runtime, branches, chosen, places)
    slot_of_read = {id(step): slot for slot, step in reads.items()}
    order = [
        slot_of_read.get(id(step))
        for entry in entries
        for step in (*entry["reads"], *(step for visit in entry["visits"] for step in visit["reads"]))
    ]
    program = program_of(runtime, plain_inputs(runtime, ids, lengths), entries, readout)
    return Lowered(program, chosen, norm_branches, streams, order)


def _trunk_of(branches: Branches) -> Recording:
    """What branches start from."""
    assert branches.bases.trunk is not None, "the bases have not run yet"
    return branches.bases.trunk.bases


def _rows_of(tensor: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    # One base: a view of its rows instead of a copy a row.
    if tensor.shape[0] == 1:
        return tensor.expand(len(bases), -1, -1, -1)
    return tensor[bases]


@dataclass(frozen=True, eq=False)
class Laid:
    """Where the branches of a packed pass lie.

    Attributes:
        branches: all of them, row after row; ``rows`` and ``offsets`` where each begins.
        bases, joins: the base prompt and the first layer of each row.
        positions, owner, begin: position, branch and the branch's first position of each column, (row, column); padding
            has position 0, owner -1 and begin 0.
    """

    branches: Ints
    rows: Ints
    offsets: Ints
    bases: Ints
    joins: Ints
    positions: Ints
    owner: Ints
    begin: Ints

    def places(self, branches: Branches, above: int = 0) -> Places:
        """Row and column of any (branch, position), with so many other rows ``above``."""
        return Places(branches, self.branches, above + self.rows, self.offsets - branches.start[self.branches])


def laid_out(branches: Branches, packed: Pass) -> Laid:
    """The columns of a packed pass."""
    chosen = np.array([branch for row in packed.rows for branch in row.branches], dtype=np.int64)
    rows = np.array([number for number, row in enumerate(packed.rows) for _ in row.branches], dtype=np.int64)
    offsets = np.array([column for row in packed.rows for column in row.columns], dtype=np.int64)
    bases = np.array([row.base for row in packed.rows], dtype=np.int64)
    joins = np.array([row.join for row in packed.rows], dtype=np.int64)
    positions, owner = _tokens(branches, chosen, rows, offsets, len(packed.rows), packed.width)
    begin = np.where(owner >= 0, branches.start[np.maximum(owner, 0)], 0)
    return Laid(chosen, rows, offsets, bases, joins, positions, owner, begin)


def _tokens(branches: Branches, chosen: Ints, rows: Ints, offsets: Ints, count: int, width: int) -> tuple[Ints, Ints]:
    """Position and owning branch of each column, (row, column); padding has position 0 and owner -1."""
    start = branches.start[chosen]
    lengths = branches.end[chosen] - start
    owner_of = np.repeat(np.arange(len(chosen)), lengths)
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    row, column = rows[owner_of], offsets[owner_of] + within
    positions = np.zeros((count, width), dtype=np.int64)
    owner = np.full((count, width), -1, dtype=np.int64)
    positions[row, column] = start[owner_of] + within
    owner[row, column] = chosen[owner_of]
    return positions, owner


def pass_mask(runtime: Runtime, owner: Ints, begin: Ints, positions: Ints, past: int) -> Any:
    """The additive 4-D mask (row, 1, column, key), or a dict of masks by attention type.

    A column sees the past positions before its ``begin``, and its ``owner``'s columns up to its own; all (row, column).
    """
    device = runtime.device
    own = torch.as_tensor(owner, device=device)
    at = torch.as_tensor(positions, device=device)
    key_past = torch.arange(past, device=device)
    sees_past = key_past[None, None, :] < torch.as_tensor(begin, device=device)[:, :, None]
    order = torch.arange(own.shape[1], device=device)
    sees_own = (own[:, :, None] == own[:, None, :]) & (order[None, :, None] >= order[None, None, :])
    # Padding columns see themselves alone: a row that sees nothing would be NaN.
    sees_own &= (own[:, :, None] >= 0) | (order[None, :, None] == order[None, None, :])
    sees = torch.cat([sees_past, sees_own], dim=2)
    keys_at = torch.cat([key_past[None, :].expand(at.shape[0], -1), at], dim=1)
    return layer_masks(runtime, sees, at, keys_at)


def place_writes(
    runtime: Runtime,
    branches: Branches,
    entries: list[LayerEntry],
    chosen: Ints,
    places: Places,
    past: int | None,
    held: Held | None = None,
    reads: Mapping[Slot, Step] = MappingProxyType({}),
) -> list[tuple[int, Ints]]:
    """Put the writes of the branches ``chosen`` and some reads into the layer entries; returns what each write step belongs
    to, in program order. ``held`` says where the pass itself makes what is written (see `Writes.step`).
    """
    here = np.zeros(len(branches), dtype=bool)
    here[chosen] = True
    acting = branches.acting
    boundary: dict[int, list[tuple[int, Ints]]] = {}
    inside: dict[int, dict[str, list[tuple[int, Ints]]]] = {}
    for number, writes in enumerate(acting):
        wanted = np.flatnonzero(here[writes.branch])
        if len(wanted) == 0:
            continue
        wanted = wanted[np.argsort(writes.layer[wanted], kind="stable")]
        layers = writes.layer[wanted]
        for group in np.split(wanted, np.flatnonzero(layers[1:] != layers[:-1]) + 1):
            layer = int(writes.layer[group[0]])
            if writes.component == BOUNDARY:
                boundary.setdefault(layer, []).append((number, group))
            else:
                inside.setdefault(layer, {}).setdefault(writes.component, []).append((number, group))
                if writes.component == "resid_mid":
                    inside[layer].setdefault("mlp_out", [])
    for name, layer in reads:
        if name != BOUNDARY:
            inside.setdefault(layer, {}).setdefault(name, [])
    owners: list[tuple[int, Ints]] = []
    for entry in entries:
        layer = entry["layer"]
        for number, group in boundary.get(layer, []):
            entry["writes"].append(_step(runtime, branches, acting[number], group, places, held))
            owners.append((number, acting[number].branch[group]))
        if (BOUNDARY, layer) in reads:
            entry["reads"].append(reads[BOUNDARY, layer])
        names = inside.get(layer)
        if names is None:
            continue
        for name in ordered_visits(runtime, layer, names):
            visit = _visit_for(runtime, entry["visits"], name, layer)
            if names.get("resid_mid") and name in ("resid_mid", "mlp_out"):
                visit["bypass"] = "leaves" if name == "resid_mid" else "arrives"
            for number, group in names[name]:
                writes = acting[number]
                step = _step(runtime, branches, writes, group, places, held)
                if name == "pattern" and step["kind"] == "set":
                    step["keys"] = _key_columns(branches, writes, group, places, past, step["operand"].shape[1])
                    step["keys"] = step["keys"].to(runtime.device)
                visit["writes"].append(step)
                owners.append((number, writes.branch[group]))
            if (name, layer) in reads:
                visit["reads"].append(reads[name, layer])
    return owners


def _visit_for(runtime: Runtime, visits: list[Visit], name: str, layer: int) -> Visit:
    visit = visit_of(runtime, name, layer)
    for other in visits:
        # Components that share one tensor (fused projections) share one stop.
        if (other["module"], other["side"], other["index"]) == (visit["module"], visit["side"], visit["index"]):
            return other
    visits.append(visit)
    return visit


def _step(
    runtime: Runtime, branches: Branches, writes: Writes, group: Ints, places: Places, held: Held | None
) -> Any:
    branch = writes.branch[group]
    batch = places.row[branch]
    column = places.column(branch, writes.position[group])
    return writes.step(group, branches.base[branch], batch, column, runtime.device, held)


def _key_columns(
    branches: Branches, writes: Writes, group: Ints, places: Places, past: int | None, keys: int
) -> torch.Tensor:
    """For each pattern write, the key column at which each key position of its branch lies: (write, key position)."""
    # Key positions after the query have weight zero; they are sent to the query's own column.
    clipped = np.minimum(np.arange(keys)[None, :], writes.position[group][:, None])
    if past is None:
        return torch.as_tensor(clipped)
    branch = writes.branch[group]
    start = branches.start[branch][:, None]
    own = past + places.shift[branch][:, None] + clipped
    return torch.as_tensor(np.where(clipped < start, clipped, own))


def _readout(runtime: Runtime, branches: Branches, chosen: Ints, places: Places) -> Readout | None:
    """The readout of the measures that read logits."""
    reading = [measure for measure in branches.bases.measures if measure.boundary is None]
    bases, rows, start = branches.base[chosen], torch.as_tensor(places.row[chosen]), branches.start[chosen]
    # A position before the branch's first token is untouched: it is read at column 0 and replaced by the base's value.
    column = [
        torch.as_tensor(places.column(chosen, np.maximum(np.asarray(measure.positions)[bases], start)))
        for measure in reading
    ]
    return build_readout(runtime, reading, torch.as_tensor(bases), [rows] * len(reading), column) if reading else None


def _read_streams(
    runtime: Runtime, entries: Sequence[LayerEntry], branches: Branches, chosen: Ints, places: Places
) -> list[tuple[int, Ints]]:
    """Put the reads of projections into the layer entries; returns what each read belongs to, in program order.

    A branch that has changed nothing up to that layer and position is not read: it has the base run's value.
    """
    streams: list[tuple[int, Ints]] = []
    projections = [item for item in enumerate(branches.bases.measures) if item[1].boundary is not None]
    for entry, (number, measure) in itertools.product(entries if projections else (), projections):
        if measure.boundary != entry["layer"]:
            continue
        position = np.asarray(measure.positions)[branches.base[chosen]]
        read = np.flatnonzero((branches.join[chosen] <= entry["layer"]) & (branches.start[chosen] <= position))
        if len(read):
            batch, column = places.row[chosen[read]], places.column(chosen[read], position[read])
            at = torch.as_tensor(batch, device=runtime.device), torch.as_tensor(column, device=runtime.device)
            entry["reads"].append({"kind": "read", "batch": at[0], "column": at[1]})
            streams.append((number, read))
    return streams


def trim_last(runtime: Runtime, program: Program, branches: Branches) -> None:
    """In the last layer only measured tokens, and those whose final stream is patched into others, need the MLP: its
    output elsewhere reaches nothing.
    """
    readout, layers = program["readout"], program["layers"]
    path = runtime.geometry.table.mlp
    if readout is None or not layers or not path or program["final"]["reads"]:
        return
    last = runtime.geometry.n_layers - 1
    for writes in branches.acting:
        if writes.component != BOUNDARY and component(writes.component).inside_mlp and (writes.layer == last).any():
            return
    entry = layers[-1]
    taken = [step["taken"] for step in program["final"]["writes"] if "taken" in step]
    batch = torch.cat([readout["batch"], *(row for row, _ in taken)])
    column = torch.cat([readout["column"], *(at for _, at in taken)])
    keep = batch < entry["rows"]
    entry["trim"] = {
        "module": f"{runtime.geometry.table.layers}.{last}.{path}",
        "batch": batch[keep],
        "column": column[keep],
    }
