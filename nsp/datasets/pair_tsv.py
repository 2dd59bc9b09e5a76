"""A plain table of texts whose rows are joined to pairs: ``<type>_more`` and ``<type>_less`` rows with one pair id.

    pair_id	type	text
    7	gender_more	Women cannot park a car.
    7	gender_less	Men cannot park a car.

Columns: the pair id (``pair_id``, ``id`` or ``pair``), the label (``type``, ``label`` or ``bias_type``), the text
(``text``, ``sentence`` or ``prompt``), and, where there are any, ``language`` and ``subset``. Tabs between columns in
``.tsv``, commas in ``.csv``.
"""

from __future__ import annotations

from pathlib import Path

from nsp.datasets.bias_pairs import BadRow, BiasPair, BiasPairs, delimited_rows, finish
from nsp.datasets.table_files import Row, read_text
from nsp.errors import InputError

_NAMES = {
    "id": ("pair_id", "id", "pair"),
    "label": ("type", "label", "bias_type"),
    "text": ("text", "sentence", "prompt"),
}


def read_pair_tsv(path: str | Path) -> BiasPairs:
    """The pairs of a tsv or csv file of ``<type>_more`` and ``<type>_less`` rows."""
    delimiter = "," if Path(path).suffix.lower() == ".csv" else "\t"
    return parse_pair_tsv(read_text(path), str(path), delimiter=delimiter)


def parse_pair_tsv(text: str, name: str, *, delimiter: str = "\t") -> BiasPairs:
    """The pairs of a table; rows without a partner are bad rows."""
    halves: dict[tuple[str, str], dict[str, Row]] = {}
    bad: list[BadRow] = []
    columns: dict[str, str] = {}
    for row in delimited_rows(text, name, delimiter):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        columns = columns or _columns(row, name)
        key, label, words = (row.values[columns[what]].strip() for what in ("id", "label", "text"))
        kind, _, side = label.rpartition("_")
        if not kind or side not in ("more", "less"):
            bad.append(BadRow(row.where, f"the label {label!r} is not <type>_more or <type>_less"))
        elif not key or not words:
            bad.append(BadRow(row.where, "the pair id or the text is empty"))
        elif side in halves.setdefault((kind, key), {}):
            bad.append(BadRow(row.where, f"pair {key!r} has a {label} row already"))
        else:
            halves[(kind, key)][side] = row
    pairs = []
    for (kind, key), sides in halves.items():
        if len(sides) < 2:
            side, row = next(iter(sides.items()))
            missing = "less" if side == "more" else "more"
            bad.append(BadRow(row.where, f"pair {key!r} has no {kind}_{missing} row"))
            continue
        more, less = sides["more"], sides["less"]
        pairs.append(
            BiasPair(
                f"{kind}-{key}",
                kind,
                more.values[columns["text"]].strip(),
                less.values[columns["text"]].strip(),
                "",
                more.values.get("language", ""),
                more.values.get("subset", ""),
                more.where,
            )
        )
    return finish(pairs, bad, name)


def _columns(row: Row, name: str) -> dict[str, str]:
    columns = {}
    for what, names in _NAMES.items():
        column = next((candidate for candidate in names if candidate in row.values), None)
        if column is None:
            raise InputError(
                f"{name}: no column for the {what} of a pair ({', '.join(names)}); there are {', '.join(map(repr, row.values))}"
            )
        columns[what] = column
    return columns
