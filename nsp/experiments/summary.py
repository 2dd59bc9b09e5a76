"""What an experiment says about its results: plain data that the CLI, a notebook or a report renders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SummaryTable:
    """A table: a title, column names, rows of text and numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Summary:
    """A title, a few sentences, and tables."""

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[SummaryTable, ...] = ()

    def __str__(self) -> str:
        parts = [self.title, *self.lines]
        for table in self.tables:
            parts += ["", table.title, "  ".join(table.columns)]
            parts += [
                "  ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) for row in table.rows
            ]
        return "\n".join(parts)
