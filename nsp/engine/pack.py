"""Packing: branches into rows, rows into passes.

A row holds the changed suffixes of several branches of one base prompt that start at one layer, side by side. A pass
is a batch of rows of one width; rows join it at the layer where their branches start, so no layer runs for a branch
that does not need it. Wider rows make fewer copies of the trunk's keys and values, narrower rows spend less on
attention between
branches that cannot see each other: the width is chosen by a cost estimate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nsp.engine.branches import BranchTable
from nsp.engine.cost import Cost

# Above this many tokens a branch gets a row to itself: packing two would only add attention between them.
_LONE = 96
_WIDEST = 256


@dataclass(frozen=True)
class Row:
    """Branches of one base prompt that start at one layer, with the column at which each begins."""

    base: int
    join: int
    branches: tuple[int, ...]
    columns: tuple[int, ...]
    width: int
    past: int  # trunk positions that the row's branches read: 0 .. past - 1


@dataclass(frozen=True)
class Pass:
    """One forward pass: rows in the order in which they join, padded to ``width`` columns, over ``past`` trunk
    positions.
    """

    rows: tuple[Row, ...]
    width: int
    past: int

    @property
    def start(self) -> int:
        return self.rows[0].join

    @property
    def tokens(self) -> int:
        """Columns of the whole pass, padding included."""
        return len(self.rows) * self.width

    def token_layers(self, n_layers: int) -> int:
        """Columns times the layers that each runs through."""
        return sum(self.width * (n_layers - row.join) for row in self.rows)


def pack(table: BranchTable, cost: Cost, max_tokens: int) -> list[Pass]:
    """The passes that run every live branch of ``table``."""
    live = table.live
    if len(live) == 0:
        return []
    lengths = table.lengths()[live]
    short = live[lengths <= _LONE]
    passes: list[Pass] = []
    if len(short):
        passes += _passes(_packed_rows(table, short, cost, max_tokens), max_tokens)
    lone = live[lengths > _LONE]
    rows = [Row(int(table.base[b]), int(table.join[b]), (int(b),), (0,), int(table.end[b] - table.start[b]), int(table.start[b]))
            for b in lone]  # fmt: skip
    for group in _similar(rows):
        passes += _passes(group, max_tokens)
    return passes


def _packed_rows(table: BranchTable, branches: np.ndarray, cost: Cost, max_tokens: int) -> list[Row]:
    lengths = table.lengths()
    # One base and one layer at a time: rows share the trunk's keys and the layer at which they join.
    order = np.lexsort((-lengths[branches], table.base[branches], table.join[branches]))
    ordered = branches[order]
    keys = np.stack([table.join[ordered], table.base[ordered]], axis=1)
    cuts = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    groups = np.split(ordered, cuts)
    longest = int(lengths[branches].max())
    past = int(table.start[branches].max())
    shapes: dict[tuple[int, ...], int] = {}
    for group in groups:
        shape = tuple(int(n) for n in lengths[group])
        shapes[shape] = shapes.get(shape, 0) + 1
    wider = {longest + 1, *(width for width in (16, 32, 64, 128, _WIDEST) if width > longest)}
    candidates = sorted({longest, *(width for width in wider if width <= max_tokens)})
    packed = {width: {shape: _bins(shape, width) for shape in shapes} for width in candidates}

    def total(width: int) -> float:
        rows = sum(len(packed[width][shape]) * count for shape, count in shapes.items())
        return cost.rows(rows, width, past)

    width = min(candidates, key=total)
    rows = []
    for group in groups:
        for members in packed[width][tuple(int(n) for n in lengths[group])]:
            chosen = group[list(members)]
            columns = np.concatenate([[0], np.cumsum(lengths[chosen])])
            rows.append(
                Row(
                    int(table.base[chosen[0]]),
                    int(table.join[chosen[0]]),
                    tuple(int(b) for b in chosen),
                    tuple(int(c) for c in columns[:-1]),
                    int(columns[-1]),
                    int(table.start[chosen].max()),
                )
            )
    return rows


def _bins(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First-fit decreasing (``lengths`` come sorted, longest first): indices of the members of each bin."""
    if lengths[0] == lengths[-1]:
        each = width // lengths[0]
        return [list(range(low, min(low + each, len(lengths)))) for low in range(0, len(lengths), each)]
    bins: list[list[int]] = []
    free: list[int] = []
    first = 0  # bins before this one are full
    for index, length in enumerate(lengths):
        for number in range(first, len(bins)):
            if free[number] >= length:
                bins[number].append(index)
                free[number] -= length
                break
        else:
            bins.append([index])
            free.append(width - length)
        while first < len(bins) and free[first] == 0:
            first += 1
    return bins


def _similar(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows grouped by length, so that padding to the longest of a group wastes at most an eighth."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.width, row.join)):
        if group and row.width < group[0].width * 7 // 8:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _passes(rows: list[Row], max_tokens: int) -> list[Pass]:
    ordered = sorted(rows, key=lambda row: row.join)
    passes = []
    while ordered:
        width = max(row.width for row in ordered)
        count = max(1, max_tokens // width)
        # Passes of equal size: a last pass of a few rows would run at a small matrix product's speed.
        count = -(-len(ordered) // -(-len(ordered) // count))
        taken, ordered = ordered[:count], ordered[count:]
        passes.append(Pass(tuple(taken), max(row.width for row in taken), max(row.past for row in taken)))
    return passes
