"""Properties of the plan of a sweep: cells to branches, branches to rows, rows to passes, and values back to cells."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from nsp.engine.branches import Bases, Branches, Cells, Writes
from nsp.engine.cost import Cost
from nsp.engine.lowering import Operand, Resolved, cells_of, write_columns
from nsp.engine.pack import Pass, pack
from nsp.errors import InputError
from nsp.sites import Site

LAYERS = 5
QUICK = settings(deadline=None, max_examples=150)


def branches_of(ends: list[int], stated: list[tuple[int, list[tuple[int, int]]]]) -> Branches:
    """Branches (base, writes (layer, position)); ``ends`` are the lengths of the bases."""
    rows = [(number, layer, place) for number, (_, writes) in enumerate(stated) for layer, place in writes]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    writes = Writes("boundary", "set", 1, columns[0], columns[1], columns[2], np.zeros(len(rows), dtype=np.int64))
    base = np.array([base for base, _ in stated], dtype=np.int64)
    return Branches(Bases([(0,) * end for end in ends], LAYERS), base, [writes])


@some.composite
def some_branches(draw: some.DrawFn, longest: int = 24) -> Branches:
    ends = draw(some.lists(some.integers(1, longest), min_size=1, max_size=4))
    # Few layers make many branches of one kind, as in the sweep of one layer's neurons.
    write = some.tuples(some.integers(0, draw(some.integers(0, LAYERS))), some.integers(0, longest))
    branch = some.tuples(some.integers(0, len(ends) - 1), some.lists(write, max_size=3))
    copies = draw(some.sampled_from([1, 1, 20]))
    return branches_of(ends, draw(some.lists(branch, min_size=1, max_size=60)) * copies)


costs = some.sampled_from([Cost(1.0, 1.0, 1.0), Cost(1e6, 1.0, 1.0), Cost(1.0, 1.0, 1e6), Cost(1.0, 1e6, 1.0)])


def check(branches: Branches, passes: list[Pass]) -> None:
    lengths = branches.lengths
    placed = [branch for made in passes for row in made.rows for branch in row.branches]
    assert sorted(placed) == branches.live.tolist()
    for made in passes:
        assert [row.join for row in made.rows] == sorted(row.join for row in made.rows)
        assert made.start == made.rows[0].join
        assert made.tokens == made.width * len(made.rows)
        for row in made.rows:
            assert {int(branches.base[branch]) for branch in row.branches} == {row.base}
            assert {int(branches.join[branch]) for branch in row.branches} == {row.join}
            assert row.past >= max(int(branches.start[branch]) for branch in row.branches)
            assert row.past <= made.past
            columns = sorted(zip(row.columns, row.branches, strict=True))
            ends = [column + int(lengths[branch]) for column, branch in columns]
            starts = [column for column, _ in columns[1:]]
            assert all(end <= start for end, start in zip(ends, starts, strict=False)), "branches overlap"
            assert columns[0][0] >= 0
            assert ends[-1] <= row.width <= made.width


@given(some_branches(), costs, some.integers(24, 4000))
@QUICK
def test_every_branch_has_its_own_columns_in_one_row(branches: Branches, cost: Cost, most: int) -> None:
    check(branches, pack(branches, cost, most))


@given(some_branches(), costs, some.integers(0, 400))
@example(branches_of([11], [(0, [(1, 10)])] * 60), Cost(1.0, 1.0, 1e6), 3)
@QUICK
def test_no_pass_is_larger_than_the_budget(branches: Branches, cost: Cost, spare: int) -> None:
    """The budget holds wherever one branch fits into it."""
    most = int(branches.lengths.max(initial=1)) + spare
    assert all(made.tokens <= most for made in pack(branches, cost, most))


@given(some_branches(longest=300), costs, some.integers(300, 2000))
@settings(deadline=None, max_examples=60)
def test_long_branches_too(branches: Branches, cost: Cost, most: int) -> None:
    passes = pack(branches, cost, most)
    check(branches, passes)
    assert all(made.tokens <= most for made in passes)


def test_nothing_runs_for_branches_whose_effect_is_zero() -> None:
    branches = branches_of([4, 6], [(0, []), (0, [(1, 4)]), (1, [(2, 5), (0, 9)]), (1, [])])
    assert branches.pruned.tolist() == [True, True, False, True]
    assert (branches.start[2], branches.join[2], branches.lengths[2]) == (5, 2, 1)
    (made,) = pack(branches, Cost(1.0, 1.0, 1.0), 100)
    assert made.rows[0].branches == (2,)
    assert pack(branches_of([4], [(0, [])]), Cost(1.0, 1.0, 1.0), 100) == []


# Cells


@given(some.lists(some.tuples(*[some.integers(1, 4)] * 3), min_size=1, max_size=4))
@QUICK
def test_values_come_back_to_their_cells(sizes: list[tuple[int, int, int]]) -> None:
    grid = Cells(("layer", "position", "unit"), tuple(sizes))
    assert grid.counts == tuple(a * b * c for a, b, c in sizes)
    values = np.arange(sum(grid.counts), dtype=np.float64)
    cells = grid.scatter(values)
    assert cells.shape == (len(sizes), *grid.shape)
    number = 0
    for base, (layers, positions, units) in enumerate(sizes):
        for cell in itertools.product(range(layers), range(positions), range(units)):
            assert cells[(base, *cell)] == number
            number += 1
    assert np.isfinite(cells).sum() == number


@some.composite
def resolved_sites(draw: some.DrawFn) -> Resolved:
    layers = tuple(draw(some.lists(some.integers(0, 9), min_size=1, max_size=3, unique=True)))
    positions = some.lists(some.integers(0, 9), min_size=1, max_size=3, unique=True).map(tuple)
    bases = tuple(draw(some.lists(positions, min_size=1, max_size=3)))
    units = draw(some.lists(some.integers(0, 7), min_size=1, max_size=3, unique=True))
    rows = np.array([[unit] for unit in units], dtype=np.int64)
    return Resolved(Site.parse("z[*]"), "z", layers, layers, bases, tuple(units), rows, 8)


@given(resolved_sites(), some.sets(some.sampled_from(["layer", "position", "unit"])), some.booleans())
@QUICK
def test_each_branch_writes_its_cell_and_nothing_else(site: Resolved, axes: set[str], moving: bool) -> None:
    """A swept intervention writes what the cell selects; a fixed one all of its site, in every branch."""
    swept = tuple(axis for axis in ("layer", "position", "unit") if axis in axes)
    bases = len(site.positions)
    grid = cells_of([site], swept, bases)
    writes = write_columns(site, Operand("scale"), grid, moving=moving)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for branch, layer, position, unit in zip(writes.branch, writes.layer, writes.position, writes.unit, strict=True):
        found.setdefault(int(branch), []).append((int(layer), int(position), int(unit)))
    assert site.units is not None
    number = 0
    for base, positions in enumerate(site.positions):
        parts = {"layer": site.slot_layers, "position": positions, "unit": site.units}
        cells = itertools.product(*(parts[axis] if axis in swept else [None] for axis in parts))
        for cell in cells:
            chosen = [
                values if part is None or not moving else (part,)
                for values, part in zip(parts.values(), cell, strict=True)
            ]
            assert sorted(found[number]) == sorted(itertools.product(*chosen)), (base, cell)
            number += 1
    assert set(found) == set(range(number))


def test_sites_swept_together_must_agree_in_size() -> None:
    rows = np.zeros((1, 1), dtype=np.int64)
    one = Resolved(Site.parse("z[0,1]"), "z", (0, 1), (0, 1), ((0, 1),), None, rows, 1)
    other = Resolved(Site.parse("q[0]"), "q", (0,), (0,), ((0, 1),), None, rows, 1)
    assert cells_of([one, other], ("position",), 1).sizes == ((1, 2, 1),)
    with pytest.raises(InputError, match=r"z\[0,1\].*q\[0\]"):
        cells_of([one, other], ("layer", "position"), 1)
