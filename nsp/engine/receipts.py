"""Receipts: the evidence of what each intervention did. Nothing silently does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nsp.engine.branches import Branches, Ints
from nsp.errors import NspError
from nsp.html import Table, card, ranges


@dataclass(frozen=True)
class Receipt:
    """What one intervention did.

    Attributes:
        op, site: the intervention.
        fired: how many times it wrote (sites times units times branches); ``branches`` in how many branches.
        unchanged: branches that were not run because the effect is exactly zero (equal values, or nothing
            measured reads the site).
        layers, positions: where it wrote; ``positions`` over all base prompts.
        rows: how many base prompts it touched.
        change_mean, change_max: L2 norm of the change that it made, over branches.
        path, reason: which path ran, and why.
    """

    op: str
    site: str
    fired: int
    branches: int
    unchanged: int
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    rows: int
    change_mean: float
    change_max: float
    path: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        return {**data, "layers": list(self.layers), "positions": list(self.positions)}

    def __str__(self) -> str:
        return (
            f"{self.op} {self.site}: fired {self.fired}x in {self.branches} branches ({self.unchanged} exactly unchanged), "
            f"{self.rows} prompt(s), change mean {self.change_mean:.4g} max {self.change_max:.4g}, {self.path} path ({self.reason})"
        )

    def _repr_html_(self) -> str:
        return card("Receipt", f"{self.op} {self.site}", tables=[receipts_table([self])])


class Receipts(tuple[Receipt, ...]):
    """The receipts of one run: a tuple that shows itself in a notebook."""

    def _repr_html_(self) -> str:
        return card("Receipts", tables=[receipts_table(self)])


def receipts_table(receipts: Sequence[Receipt]) -> Table:
    """One row an intervention: what it did, where, and by which path."""
    columns = (
        "intervention", "writes", "branches", "exactly unchanged", "layers", "positions", "prompts", "mean change", "largest change",
        "path", "since",
    )  # fmt: skip
    rows = [
        (
            f"{one.op} {one.site}", one.fired, one.branches, one.unchanged, ranges(one.layers), ranges(one.positions), one.rows,
            one.change_mean, one.change_max, one.path, one.reason,
        )
        for one in receipts
    ]  # fmt: skip
    return Table("what each intervention did; changes are L2 norms at the site", columns, rows)


def receipts_of(branches: Branches, fired: Ints, squared: np.ndarray) -> tuple[Receipt, ...]:
    """One receipt for each intervention stated; ``fired`` and ``squared`` have axes (intervention, branch).

    An intervention that was due and never fired is an error.
    """
    receipts = []
    for number, (intervention, item, _) in enumerate(branches.stated):
        writes = branches.writes[number]
        due = np.unique(writes.branch)
        due = due[~branches.pruned[due]]
        wrote = np.flatnonzero(fired[number])
        if len(wrote) < len(due):
            raise NspError(
                f"{intervention.op} {item.site}: the site never ran in {len(due) - len(wrote)} of {len(due)} branches; "
                "nothing was written there, so the result would be wrong"
            )
        change = np.sqrt(squared[number][wrote])
        layer_of = dict(zip(item.slot_layers, item.layers, strict=True))
        receipts.append(
            Receipt(
                op=intervention.op,
                site=str(item.site),
                fired=int(fired[number].sum()),
                branches=len(wrote),
                unchanged=len(branches) - len(wrote),
                layers=tuple(map(layer_of.__getitem__, np.unique(writes.layer).tolist())),
                positions=tuple(np.unique(writes.position).tolist()),
                rows=len(np.unique(branches.base[writes.branch])),
                change_mean=float(change.mean()) if len(change) else 0.0,
                change_max=float(change.max()) if len(change) else 0.0,
                path=branches.bases.path,
                reason=branches.bases.reason,
            )
        )
    return tuple(receipts)
