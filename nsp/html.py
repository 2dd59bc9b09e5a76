"""Cards: how nsp's values show themselves in a notebook. Plain data in, one small self-contained piece of HTML out.

A class says in its ``_repr_html_`` what is to be seen (facts, tokens, tables); how that looks stands here alone. A card has
no script and loads nothing. Its colours are the notebook's own with transparent greys, so that it reads in light and dark;
a viewer that drops styles (GitHub does) still shows the tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

# Rows of a table that a card shows; the caption says how many there are.
MOST_ROWS = 20
_LONGEST_TEXT = 400

_STYLE = """
.nsp-card{max-width:100%;font-size:13px;line-height:1.45;color:inherit}
.nsp-card p{margin:.2em 0}
.nsp-card .nsp-wide{overflow-x:auto;max-width:100%}
.nsp-card table{border-collapse:collapse;margin:.35em 0;font-size:12px;color:inherit;background:transparent}
.nsp-card caption{caption-side:top;text-align:left;padding:.2em 0;color:inherit;opacity:.75}
.nsp-card tr{background:transparent!important}
.nsp-card th,.nsp-card td{text-align:left!important;padding:.15em .7em .15em 0;vertical-align:top;color:inherit;border:0}
.nsp-card td{white-space:pre-wrap;overflow-wrap:anywhere;min-width:2em;max-width:48em}
.nsp-card th{white-space:nowrap;font-weight:600}
.nsp-card .nsp-rows td,.nsp-card .nsp-rows th{border-top:1px solid rgba(128,128,128,.3)}
.nsp-card .nsp-rows td{white-space:pre;max-width:none}
.nsp-card .nsp-number{text-align:right!important;font-variant-numeric:tabular-nums}
.nsp-card .nsp-token{display:inline-block;white-space:pre;font-family:monospace;margin:1px 2px 1px 0;padding:0 2px;
border:1px solid rgba(128,128,128,.4);border-radius:3px}
.nsp-card .nsp-token sub{opacity:.65;font-size:9px;padding-left:2px}
.nsp-card .nsp-marked{background:rgba(240,160,0,.25)}
.nsp-card .nsp-note{border-left:3px solid rgba(230,140,0,.8);padding-left:.5em}
""".strip().replace("\n", "")


@dataclass(frozen=True)
class Tokens:
    """A prompt's tokens as a row of boxes with their positions; ``marks`` says of some positions what they are."""

    texts: Sequence[str]
    marks: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows under column names. Numbers stand to the right with four digits; None is a dash; NaN is said to be NaN."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def card(
    kind: str,
    subject: str = "",
    *,
    facts: Iterable[tuple[str, Any]] = (),
    lines: Iterable[str] = (),
    notes: Iterable[str] = (),
    tables: Iterable[Table] = (),
) -> str:
    """A value as HTML.

    Args:
        kind, subject: what it is, and which one: the heading.
        facts: (name, value) pairs; a value is text, a number, or `Tokens`.
        lines: sentences.
        notes: what a reader must not miss, such as a fallback that was taken.
        tables: further down; a long one shows its first `MOST_ROWS` rows and says so.
    """
    named = f" <code>{_text(subject)}</code>" if subject else ""
    parts = [f"<p><strong>{_text(kind)}</strong>{named}</p>"]
    parts += [f"<p>{_text(line)}</p>" for line in lines]
    parts += [f'<p class="nsp-note">{_text(note)}</p>' for note in notes]
    rows = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_value(value)}</td></tr>' for name, value in facts)
    if rows:
        parts.append(_wide(f"<table><tbody>{rows}</tbody></table>", f"{kind} {subject}"))
    parts += [_table(table) for table in tables if table.rows]
    return f'<div class="nsp-card"><style>{_STYLE}</style>{"".join(parts)}</div>'


def shown(text: str) -> str:
    """A token's text with what cannot be printed written as an escape; its spaces stay."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in short: ``0-4, 7, 9-11``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def _table(table: Table) -> str:
    numeric = [_is_numeric(row[place] for row in table.rows) for place in range(len(table.columns))]
    kinds = [' class="nsp-number"' if number else "" for number in numeric]
    head = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_value(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in table.rows[:MOST_ROWS]
    )
    count = len(table.rows)
    more = f" (the first {MOST_ROWS} of {count})" if count > MOST_ROWS else ""
    caption = f"<caption>{_text(table.title + more)}</caption>"
    inner = f'<table class="nsp-rows">{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return _wide(inner, table.title)


def _wide(table: str, label: str) -> str:
    """A table that scrolls sideways where it does not fit, by keyboard as well."""
    return f'<div class="nsp-wide" role="region" tabindex="0" aria-label="{escape(label, quote=True)}">{table}</div>'


def _is_numeric(cells: Iterable[Any]) -> bool:
    present = [cell for cell in cells if cell is not None]
    return bool(present) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in present)


def _value(value: Any) -> str:
    if isinstance(value, Tokens):
        return "".join(_token(position, text, value.marks.get(position)) for position, text in enumerate(value.texts))
    if value is None:
        return "–"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:.4g}"
    return _text(str(value))


def _token(position: int, text: str, mark: str | None) -> str:
    attributes = (
        'class="nsp-token"' if mark is None else f'class="nsp-token nsp-marked" title="{escape(mark, quote=True)}"'
    )
    return f"<span {attributes}>{escape(shown(text))}<sub>{position}</sub></span> "


def _text(text: str) -> str:
    return escape(text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…")
