"""CrowS-Pairs in its own csv form (Nangia et al. 2020), and where the published file is.

Columns: ``sent_more``, ``sent_less``, ``stereo_antistereo``, ``bias_type``; an unnamed first column is the row's
number; others are ignored. ``sent_more`` is the more stereotyping sentence in either direction.
"""

from __future__ import annotations

from pathlib import Path

from nsp.datasets.bias_pairs import BadRow, BiasPair, BiasPairs, delimited_rows, finish, require_columns
from nsp.datasets.table_files import read_text

URL = "https://raw.githubusercontent.com/nyu-mll/crows-pairs/master/data/crows_pairs_anonymized.csv"
SHA256 = "dfb36986ce0502abbaf7055b9176da3d08d48e07df1251991b5dfbcbceab9d0c"
LICENCE = "CC BY-SA 4.0"
PAIRS = 1508
COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")


def read_crows(path: str | Path) -> BiasPairs:
    """The pairs of a CrowS-Pairs csv file."""
    return parse_crows(read_text(path), str(path))


def parse_crows(text: str, name: str) -> BiasPairs:
    """The pairs of a CrowS-Pairs csv text; ``name`` stands for it in messages."""
    pairs: list[BiasPair] = []
    bad: list[BadRow] = []
    checked = False
    for number, row in enumerate(delimited_rows(text, name)):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        if not checked:
            require_columns(row, COLUMNS, name, "CrowS-Pairs")
            checked = True
        values = row.values
        direction = values["stereo_antistereo"].strip()
        empty = [column for column in ("sent_more", "sent_less", "bias_type") if not values[column].strip()]
        if empty:
            bad.append(BadRow(row.where, f"{empty[0]} is empty"))
        elif direction not in ("stereo", "antistereo"):
            bad.append(BadRow(row.where, f"stereo_antistereo is {direction!r}, not stereo or antistereo"))
        else:
            key = values.get("", "").strip() or str(number)
            pairs.append(
                BiasPair(
                    key,
                    values["bias_type"].strip(),
                    values["sent_more"],
                    values["sent_less"],
                    direction,
                    values.get("language", "") or "",
                    direction,
                    row.where,
                )
            )
    return finish(pairs, bad, name)
