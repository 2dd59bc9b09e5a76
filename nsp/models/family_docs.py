"""The table of families and their components, as Markdown: ``python -m nsp.models.family_docs FILE...`` renews it between its markers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsp.errors import InputError
from nsp.models.families import TABLES
from nsp.models.tables import SiteTable
from nsp.sites import COMPONENTS, IN_LAYER

BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
_HEADS = tuple(name for name in IN_LAYER if COMPONENTS[name].has_heads and name != "pattern")
_REST = tuple(name for name in IN_LAYER if not COMPONENTS[name].has_heads)


def families_table() -> str:
    """One row a table. ``embed``, ``resid_pre``, ``resid_post`` and ``logits`` exist in every family and have no column."""
    header = ["family", " ".join(f"`{name}`" for name in _HEADS), *(f"`{name}`" for name in ("pattern", *_REST)), "sweeps take the"]
    rows = [header, ["---", *[":-:"] * (len(header) - 2), "---"]]
    rows += [_row(table) for tables in TABLES.values() for table in sorted(tables, key=lambda table: table.variant)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(table: SiteTable) -> list[str]:
    def cell(*names: str) -> str:
        return "yes" if all(name in table.components for name in names) else "–"

    pattern = "yes" if table.attention_call else "–"
    path = f"plain path: {table.branch}" if table.branch else "branch path"
    cells = [cell(*_HEADS), pattern, *(cell(name) for name in _REST)]
    return [table.name, *cells, path]


def renewed(text: str) -> str:
    """``text`` with the table between its markers renewed; raises InputError where a marker is missing."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise InputError(f"there is no {BEGIN} with {END} behind it")
    return text[: begin + len(BEGIN)] + f"\n{families_table()}\n" + text[end:]


def main(files: Sequence[str]) -> None:
    """Renew the table in each file."""
    for name in files:
        path = Path(name)
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
