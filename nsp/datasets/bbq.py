"""BBQ (Parrish et al. 2022) and MBBQ (Neplenbroek et al. 2024) jsonl items as pairs of texts.

An item is a context, a question and three answers, one of which is "unknown". The pair is the item with each of the
other two: ``more`` ends in the answer that confirms the stereotype, ``less`` in the other. Which one that is follows
from ``additional_metadata.stereotyped_groups``: the stereotyped group in a negative question (``question_polarity``
neg), the other group in a non-negative one.

``bias_type`` is the item's category, ``subset`` its ``context_condition`` (ambig, disambig); the language is the item's
``language`` or the ending of the file's name (``Age_nl.jsonl``), and ``_control`` files are of subset
``control-ambig``, ``control-disambig``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nsp.datasets.bias_pairs import BadRow, BiasPair, BiasPairs, finish, json_rows
from nsp.datasets.table_files import Row, read_text

_ANSWERS = ("ans0", "ans1", "ans2")
_NAME = re.compile(r"(?P<control>_control)?_(?P<language>[a-z]{2})$")


def read_bbq(path: str | Path) -> BiasPairs:
    """The items of a BBQ or MBBQ file as pairs."""
    named = _NAME.search(Path(path).stem)
    language = named["language"] if named else ""
    control = bool(named and named["control"])
    return parse_bbq(read_text(path), str(path), language=language, control=control)


def parse_bbq(text: str, name: str, *, language: str = "", control: bool = False) -> BiasPairs:
    """The items of a jsonl text as pairs; ``name`` stands for it in messages."""
    pairs: list[BiasPair] = []
    bad: list[BadRow] = []
    for row in json_rows(text, name):
        pair = row if isinstance(row, BadRow) else _pair(row, language, control)
        if isinstance(pair, BadRow):
            bad.append(pair)
        else:
            pairs.append(pair)
    return finish(pairs, bad, name)


def _pair(row: Row, language: str, control: bool) -> BiasPair | BadRow:
    values = row.values
    for key in ("context", "question", *_ANSWERS, "category"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            return BadRow(row.where, f"{key} is {values.get(key)!r:.40}, not a text")
    groups = _groups(values.get("answer_info"))
    if groups is None:
        return BadRow(row.where, "answer_info does not name a group for each of ans0, ans1, ans2")
    metadata = values.get("additional_metadata")
    stereotyped = metadata.get("stereotyped_groups") if isinstance(metadata, dict) else None
    if not isinstance(stereotyped, list) or not stereotyped:
        return BadRow(row.where, "additional_metadata has no stereotyped_groups, so no answer is the stereotyped one")
    known = [answer for answer in _ANSWERS if groups[answer] != "unknown"]
    targets = {_folded(group) for group in stereotyped}
    hit = [answer for answer in known if _folded(groups[answer]) in targets]
    if len(known) != 2 or len(hit) != 1:
        return BadRow(
            row.where,
            f"{len(hit)} of the {len(known)} known answers ({', '.join(groups[answer] for answer in known)}) are of the "
            f"stereotyped groups ({', '.join(map(str, stereotyped))}); one is needed",
        )
    polarity = values.get("question_polarity")
    if polarity not in ("neg", "nonneg"):
        return BadRow(row.where, f"question_polarity is {polarity!r}, not neg or nonneg")
    other = next(answer for answer in known if answer != hit[0])
    more, less = (hit[0], other) if polarity == "neg" else (other, hit[0])
    start = f"{values['context'].strip()} {values['question'].strip()}"
    condition = str(values.get("context_condition", ""))
    item = f"{values['category']}-{values.get('question_index', '')}-{values.get('example_id', row.where)}"
    return BiasPair(
        item,
        values["category"],
        f"{start} {values[more].strip()}",
        f"{start} {values[less].strip()}",
        "",
        str(values.get("language") or language),
        f"control-{condition}" if control else condition,
        row.where,
    )


def _groups(info: Any) -> dict[str, str] | None:
    """The group of each answer: the last entry of its ``answer_info``."""
    if not isinstance(info, dict):
        return None
    groups = {}
    for answer in _ANSWERS:
        entry = info.get(answer)
        if not isinstance(entry, list) or not entry or not isinstance(entry[-1], str):
            return None
        groups[answer] = entry[-1]
    return groups


def _folded(group: object) -> str:
    """Groups are spelt ``low SES`` in one place and ``lowSES`` in another."""
    return re.sub(r"[\W_]+", "", str(group)).casefold()
