"""What an experiment says about its results: plain data that the CLI, a notebook or a report renders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsp.html import Table, card
from nsp.report.labels import cell_text


@dataclass(frozen=True)
class SummaryTable:
    """A table: a title, column names, rows of text and numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, title: str, columns: Mapping[str, Iterable[Any]]) -> SummaryTable:
        """A table from its columns, which are equally long; arrays become plain numbers and texts."""
        cells = [values.tolist() if isinstance(values, np.ndarray) else list(values) for values in columns.values()]
        return cls(title, tuple(columns), tuple(zip(*cells, strict=True)))

    def only(self, columns: Sequence[str], title: str) -> SummaryTable:
        """Some of the columns, in the order given, under another title."""
        places = [self.columns.index(name) for name in columns]
        return SummaryTable(title, tuple(columns), tuple(tuple(row[place] for place in places) for row in self.rows))


@dataclass(frozen=True)
class Summary:
    """A title, a few sentences, and tables."""

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[SummaryTable, ...] = ()

    def __str__(self) -> str:
        parts = [self.title, *self.lines]
        for table in self.tables:
            rows = [list(table.columns), *([cell_text(cell) for cell in row] for row in table.rows)]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            parts += ["", table.title]
            parts += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        tables = [Table(table.title, table.columns, table.rows) for table in self.tables]
        return card("Results", self.title, lines=self.lines, tables=tables)
