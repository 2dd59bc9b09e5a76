"""Packing: branches into rows, rows into passes.

A row holds the changed suffixes of several branches of one base prompt that start at one layer, side by side. A pass
is a batch of rows of one width; rows join it at the layer where their branches start, so no layer runs for a branch
that does not need it. Wider rows make fewer copies of the trunk's keys and values, narrower rows spend less on
attention between
branches that cannot see each other: the width is chosen by a cost estimate.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nsp.engine.branches import Branches
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


def pack(branches: Branches, cost: Cost, max_tokens: int) -> list[Pass]:
    """The passes that run every live branch."""
    live = branches.live
    if len(live) == 0:
        return []
    lengths = branches.lengths[live]
    short = live[lengths <= _LONE]
    passes: list[Pass] = []
    if len(short):
        passes += _passes(_packed_rows(branches, short, cost, max_tokens), max_tokens)
    lone = live[lengths > _LONE]
    rows = [lone_row(branches, branch) for branch in lone.tolist()]
    for group in _similar(rows):
        passes += _passes(group, max_tokens)
    return passes


def lone_row(branches: Branches, branch: int) -> Row:
    """A row of one branch alone."""
    start = int(branches.start[branch])
    return Row(int(branches.base[branch]), int(branches.join[branch]), (branch,), (0,), int(branches.end[branch]) - start, start)


def _packed_rows(branches: Branches, chosen: np.ndarray, cost: Cost, max_tokens: int) -> list[Row]:
    lengths = branches.lengths
    # One base and one layer at a time: rows share the trunk's keys and the layer at which they join.
    order = np.lexsort((-lengths[chosen], branches.base[chosen], branches.join[chosen]))
    ordered = chosen[order]
    keys = np.stack([branches.join[ordered], branches.base[ordered]], axis=1)
    cuts = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    groups = np.split(ordered, cuts)
    longest = int(lengths[chosen].max())
    past = int(branches.start[chosen].max())
    shapes = [tuple(lengths[group].tolist()) for group in groups]
    counts = collections.Counter(shapes)
    wider = {longest + 1, *(width for width in (16, 32, 64, 128, _WIDEST) if width > longest)}
    candidates = sorted({longest, *(width for width in wider if width <= max_tokens)})
    packed: dict[int, dict[tuple[int, ...], list[list[int]]]] = {}
    costs: list[tuple[float, int]] = []
    for width in candidates:
        packed[width] = {shape: _bins(shape, width) for shape in counts}
        total = sum([len(packed[width][shape]) * count for shape, count in counts.items()])
        costs.append((cost.rows(total, width, past), width))
    bins = packed[min(costs)[1]]
    rows = []
    for group, shape in zip(groups, shapes, strict=True):
        for members in bins[shape]:
            held = group[list(members)]
            columns = np.concatenate([[0], np.cumsum(lengths[held])]).tolist()
            rows.append(
                Row(
                    int(branches.base[held[0]]),
                    int(branches.join[held[0]]),
                    tuple(held.tolist()),
                    tuple(columns[:-1]),
                    columns[-1],
                    int(branches.start[held].max()),
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
