"""The branch path and the plain path: a `Pass` (or a batch of whole rows) lowered to a `Program`.

Branch path: the changed suffixes of many branches lie side by side in rows; each token carries its own position,
    and a 4-D mask lets it
see the trunk's keys and values before its branch's start and its own branch's earlier tokens, nothing else. Layers
below the first join are skipped, and rows join at the layer where their branches start with the trunk's hidden states.

Plain path: one row a branch, the whole prompt, every layer. The reference for every model, and the fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache

from nsp.engine.branches import BranchTable, Held, Ints, Writes
from nsp.engine.forward_pass import empty_entry, ordered_visits, plain_inputs, visit_of
from nsp.engine.masks import layer_masks
from nsp.engine.pack import Pass
from nsp.engine.program import LayerEntry, Program, Readout, Visit
from nsp.engine.readout import Measure, at_head, build_readout
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY
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
    """

    program: Program
    branches: Ints
    norm_branches: list[tuple[int, Ints]]
    streams: list[tuple[int, Ints]]


class Places:
    """Row and column of any (branch, position) of one pass; without ``columns`` every position lies in column 0."""

    def __init__(self, table: BranchTable, branches: Ints, rows: Ints, columns: Ints | None) -> None:
        self.row = np.full(len(table), -1)
        self.row[branches] = rows
        self.shift = np.zeros(len(table), dtype=np.int64)
        self.moving = columns is not None
        if columns is not None:
            self.shift[branches] = columns

    def column(self, branch: Ints, position: Ints) -> Ints:
        """The column of each (branch, position)."""
        return self.shift[branch] + position if self.moving else np.zeros_like(position)


def lower_pass(
    runtime: Runtime, table: BranchTable, trunk: Recording, measures: Sequence[Measure], made: Pass
) -> Lowered:
    """Lower one packed pass of the branch path."""
    device, n_layers = runtime.device, runtime.geometry.n_layers
    count, past = len(made.rows), made.past
    laid = laid_out(table, made)
    branches, joins, places = laid.branches, laid.joins, laid.places(table)
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
    norm_branches = place_writes(runtime, table, [*layers, final], branches, places, past)
    table_layers = runtime.geometry.table.layers
    streams = _read_streams(runtime, [*layers, final], measures, table, branches, places)
    readout = _readout(runtime, measures, table, branches, places)
    program: Program = {
        "inputs": inputs,
        "batch": count,
        "start": start,
        "skipped": [f"{table_layers}.{layer}" for layer in range(start)],
        "first": first,
        "layers": layers,
        "final": final,
        "readout": readout,
    }
    trim_last(runtime, program, table)
    return Lowered(program, branches, norm_branches, streams)


def lower_plain(
    runtime: Runtime, table: BranchTable, trunk: Recording, measures: Sequence[Measure], branches: Ints
) -> Lowered:
    """Lower a batch of branches of the plain path: one row a branch, whole prompts."""
    n_layers, device = runtime.geometry.n_layers, runtime.device
    base = torch.as_tensor(table.base[branches])
    longest = int(trunk.lengths[base].max())
    ids, lengths = trunk.ids[base.to(device), :longest], trunk.lengths[base]
    places = Places(table, branches, np.arange(len(branches)), np.zeros(len(branches), dtype=np.int64))
    layers = [empty_entry(runtime, layer, len(branches)) for layer in range(n_layers)]
    final = empty_entry(runtime, n_layers, len(branches))
    norm_branches = place_writes(runtime, table, [*layers, final], branches, places, None)
    streams = _read_streams(runtime, [*layers, final], measures, table, branches, places)
    readout = _readout(runtime, measures, table, branches, places)
    program: Program = {
        "inputs": plain_inputs(runtime, ids, lengths),
        "batch": len(branches),
        "start": 0,
        "skipped": [],
        "first": None,
        "layers": layers,
        "final": final,
        "readout": readout,
    }
    return Lowered(program, branches, norm_branches, streams)


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

    def places(self, table: BranchTable, above: int = 0) -> Places:
        """Row and column of any (branch, position), with so many other rows ``above``."""
        return Places(table, self.branches, above + self.rows, self.offsets - table.start[self.branches])


def laid_out(table: BranchTable, made: Pass) -> Laid:
    """The columns of a packed pass."""
    branches = np.array([branch for row in made.rows for branch in row.branches], dtype=np.int64)
    rows = np.array([number for number, row in enumerate(made.rows) for _ in row.branches], dtype=np.int64)
    offsets = np.array([column for row in made.rows for column in row.columns], dtype=np.int64)
    bases = np.array([row.base for row in made.rows], dtype=np.int64)
    joins = np.array([row.join for row in made.rows], dtype=np.int64)
    positions, owner = _tokens(table, branches, rows, offsets, len(made.rows), made.width)
    begin = np.where(owner >= 0, table.start[np.maximum(owner, 0)], 0)
    return Laid(branches, rows, offsets, bases, joins, positions, owner, begin)


def _tokens(table: BranchTable, branches: Ints, rows: Ints, offsets: Ints, count: int, width: int) -> tuple[Ints, Ints]:
    """Position and owning branch of each column, (row, column); padding has position 0 and owner -1."""
    lengths = table.end[branches] - table.start[branches]
    owner_of = np.repeat(np.arange(len(branches)), lengths)
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    row, column = rows[owner_of], offsets[owner_of] + within
    positions = np.zeros((count, width), dtype=np.int64)
    owner = np.full((count, width), -1, dtype=np.int64)
    positions[row, column] = table.start[branches][owner_of] + within
    owner[row, column] = branches[owner_of]
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
    table: BranchTable,
    entries: list[LayerEntry],
    branches: Ints,
    places: Places,
    past: int | None,
    held: Held | None = None,
) -> list[tuple[int, Ints]]:
    """Put the writes of ``branches`` into the layer entries; returns what each write step belongs to, in program
    order. ``held`` says where the pass itself makes what is written (see `Writes.step`).
    """
    here = np.zeros(len(table), dtype=bool)
    here[branches] = True
    boundary: dict[int, list[tuple[int, Ints]]] = {}
    inside: dict[int, dict[str, list[tuple[int, Ints]]]] = {}
    for number, writes in enumerate(table.writes):
        chosen = np.flatnonzero(here[writes.branch])
        if len(chosen) == 0:
            continue
        chosen = chosen[np.argsort(writes.layer[chosen], kind="stable")]
        layers = writes.layer[chosen]
        for group in np.split(chosen, np.flatnonzero(layers[1:] != layers[:-1]) + 1):
            layer = int(writes.layer[group[0]])
            if writes.component == BOUNDARY:
                boundary.setdefault(layer, []).append((number, group))
            else:
                inside.setdefault(layer, {}).setdefault(writes.component, []).append((number, group))
                if writes.component == "resid_mid":
                    inside[layer].setdefault("mlp_out", [])
    owners: list[tuple[int, Ints]] = []
    for entry in entries:
        layer = entry["layer"]
        for number, group in boundary.get(layer, []):
            entry["writes"].append(_step(runtime, table, table.writes[number], group, places, held))
            owners.append((number, table.writes[number].branch[group]))
        names = inside.get(layer, {})
        for name in ordered_visits(runtime, layer, names):
            visit = _visit_for(runtime, entry["visits"], name, layer)
            if "resid_mid" in names and name in ("resid_mid", "mlp_out"):
                visit["bypass"] = "leaves" if name == "resid_mid" else "arrives"
            for number, group in names[name]:
                writes = table.writes[number]
                step = _step(runtime, table, writes, group, places, held)
                if name == "pattern" and step["kind"] == "set":
                    step["keys"] = _key_columns(table, writes, group, places, past, step["operand"].shape[1])
                    step["keys"] = step["keys"].to(runtime.device)
                visit["writes"].append(step)
                owners.append((number, writes.branch[group]))
    return owners


def _visit_for(runtime: Runtime, visits: list[Visit], name: str, layer: int) -> Visit:
    visit = visit_of(runtime, name, layer)
    for made in visits:
        # Components that share one tensor (fused projections) share one stop.
        if (made["module"], made["side"], made["index"]) == (visit["module"], visit["side"], visit["index"]):
            return made
    visits.append(visit)
    return visit


def _step(
    runtime: Runtime, table: BranchTable, writes: Writes, group: Ints, places: Places, held: Held | None
) -> Any:
    branch = writes.branch[group]
    batch = places.row[branch]
    column = places.column(branch, writes.position[group])
    return writes.step(group, table.base[branch], batch, column, runtime.device, held)


def _key_columns(
    table: BranchTable, writes: Writes, group: Ints, places: Places, past: int | None, keys: int
) -> torch.Tensor:
    """For each pattern write, the key column at which each key position of its branch lies: (write, key position)."""
    # Key positions after the query have weight zero; they are sent to the query's own column.
    clipped = np.minimum(np.arange(keys)[None, :], writes.position[group][:, None])
    if past is None:
        return torch.as_tensor(clipped)
    branch = writes.branch[group]
    start = table.start[branch][:, None]
    own = past + places.shift[branch][:, None] + clipped
    return torch.as_tensor(np.where(clipped < start, clipped, own))


def _readout(
    runtime: Runtime, measures: Sequence[Measure], table: BranchTable, branches: Ints, places: Places
) -> Readout | None:
    """The readout of the measures that read logits."""
    reading = [measures[number] for number in at_head(measures)]
    batch, column = [], []
    for measure in reading:
        position = np.asarray(measure.positions)[table.base[branches]]
        batch.append(torch.as_tensor(places.row[branches]))
        # A position before the branch's first token is untouched: it is read at column 0 and replaced by the base's
        # value.
        column.append(torch.as_tensor(places.column(branches, np.maximum(position, table.start[branches]))))
    if not reading:
        return None
    return build_readout(runtime, reading, torch.as_tensor(table.base[branches]), batch, column)


def _read_streams(
    runtime: Runtime,
    entries: Sequence[LayerEntry],
    measures: Sequence[Measure],
    table: BranchTable,
    branches: Ints,
    places: Places,
) -> list[tuple[int, Ints]]:
    """Put the reads of projections into the layer entries; returns what each read belongs to, in program order.

    A branch that has changed nothing up to that layer and position is not read: it has the base run's value.
    """
    streams: list[tuple[int, Ints]] = []
    for entry in entries:
        for number, measure in enumerate(measures):
            if measure.boundary != entry["layer"]:
                continue
            position = np.asarray(measure.positions)[table.base[branches]]
            read = np.flatnonzero((table.join[branches] <= entry["layer"]) & (table.start[branches] <= position))
            if len(read) == 0:
                continue
            batch, column = places.row[branches[read]], places.column(branches[read], position[read])
            device = runtime.device
            entry["reads"].append(
                {
                    "kind": "read",
                    "batch": torch.as_tensor(batch, device=device),
                    "column": torch.as_tensor(column, device=device),
                }
            )
            streams.append((number, read))
    return streams


def trim_last(runtime: Runtime, program: Program, table: BranchTable) -> None:
    """In the last layer only measured tokens, and those whose final stream is patched into others, need the MLP: its
    output elsewhere reaches nothing.
    """
    readout, layers = program["readout"], program["layers"]
    path = runtime.geometry.table.mlp
    if readout is None or not layers or not path or program["final"]["reads"]:
        return
    last = runtime.geometry.n_layers - 1
    for writes in table.writes:
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
