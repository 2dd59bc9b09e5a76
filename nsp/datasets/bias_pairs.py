"""Pairs of sentences of which one expresses a stereotype more than the other, whatever file they come from.

A reader gives every pair that it could read and a list of what it could not, by file and line: a malformed row is
counted and named, never dropped in silence. `select_pairs` filters and draws a sample.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nsp.datasets.table_files import Row, csv_lines, text_lines
from nsp.errors import InputError


@dataclass(frozen=True)
class BiasPair:
    """Two texts that differ in whom they speak of.

    Attributes:
        pair_id: unique in its file; ``bias_type`` such as ``gender``.
        more, less: the text that expresses the stereotype more, and the one that does less.
        direction: ``stereo`` or ``antistereo`` where the file says so (CrowS-Pairs), else empty.
        language, subset: as the file says (``en``; ``ambig``), else empty.
        origin: where it was read, "pairs.csv:12".
    """

    pair_id: str
    bias_type: str
    more: str
    less: str
    direction: str = ""
    language: str = ""
    subset: str = ""
    origin: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that is no pair: where it is and what is wrong with it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class BiasPairs:
    """What a file holds: its pairs, and the rows that are none."""

    pairs: tuple[BiasPair, ...]
    bad: tuple[BadRow, ...] = ()


def delimited_rows(text: str, name: str, delimiter: str = ",") -> Iterator[Row | BadRow]:
    """The rows of a csv or tsv text; a row with another number of cells than the header is a `BadRow`."""
    header: list[str] | None = None
    for line, last, cells in csv_lines(text, delimiter):
        if isinstance(cells, csv.Error):
            upto = f" (lines {line} to {last}: is a quote not closed?)" if last > line else ""
            yield BadRow(f"{name}:{line}", f"{cells}{upto}")
        elif header is None:
            header = [cell.strip() for cell in cells]
        elif len(cells) != len(header):
            upto = f" (lines {line} to {last})" if last > line else ""
            yield BadRow(f"{name}:{line}", f"{len(cells)} cells where the header has {len(header)} columns{upto}")
        else:
            yield Row(f"{name}:{line}", dict(zip(header, cells, strict=True)))


def json_rows(text: str, name: str) -> Iterator[Row | BadRow]:
    """The objects of a jsonl text, one per line; a line that is none is a `BadRow`."""
    for line, content in enumerate(text_lines(text), 1):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            yield BadRow(f"{name}:{line}", f"not JSON: {error.msg} (column {error.colno})")
            continue
        if isinstance(value, dict):
            yield Row(f"{name}:{line}", value)
        else:
            yield BadRow(f"{name}:{line}", f"an object was expected, found {type(value).__name__}")


def require_columns(row: Row | BadRow | None, columns: Sequence[str], name: str, what: str) -> None:
    """InputError where a file's first good row lacks columns: it is then no file of this form at all."""
    if not isinstance(row, Row):
        return
    missing = [column for column in columns if column not in row.values]
    if missing:
        raise InputError(
            f"{name}: no column {', '.join(map(repr, missing))}, which {what} has; there are {', '.join(map(repr, row.values))}"
        )


def finish(pairs: Sequence[BiasPair], bad: Sequence[BadRow], name: str) -> BiasPairs:
    """The pairs of a file; InputError where it has none. A pair id that occurs twice is a bad row."""
    kept: dict[str, BiasPair] = {}
    problems = list(bad)
    for pair in pairs:
        if pair.pair_id in kept:
            first = kept[pair.pair_id].origin
            problems.append(BadRow(pair.origin, f"the pair id {pair.pair_id!r} is that of {first}"))
        elif pair.more.strip() == pair.less.strip():
            problems.append(BadRow(pair.origin, "the two texts are the same"))
        else:
            kept[pair.pair_id] = pair
    if not kept:
        reason = f"; {problems[0]}" if problems else ""
        raise InputError(f"{name}: no pair could be read{reason}")
    return BiasPairs(tuple(kept.values()), tuple(problems))


def select_pairs(
    pairs: Sequence[BiasPair],
    *,
    bias_type: Sequence[str] = (),
    language: str | None = None,
    subset: str | None = None,
    num_prompts: int | None = None,
    seed: int = 0,
) -> tuple[BiasPair, ...]:
    """The pairs that all filters keep, in their order.

    Args:
        bias_type, language, subset: keep pairs of these; InputError lists what there is where nothing is left.
        num_prompts: at most so many texts, two per pair, drawn without replacement with ``seed``.
    """
    kept = list(pairs)
    stages = [("bias_type", tuple(bias_type)), ("language", (language,)), ("subset", (subset,))]
    for field, wanted in stages:
        chosen = {value for value in wanted if value is not None}
        if not chosen:
            continue
        there = sorted({getattr(pair, field) for pair in kept})
        unknown = chosen - set(there)
        if field == "bias_type" and unknown:
            raise InputError(f"bias_type: no pair of type {', '.join(sorted(unknown))}; there are {', '.join(there)}")
        kept = [pair for pair in kept if getattr(pair, field) in chosen]
        if not kept:
            raise InputError(f"{field} {', '.join(sorted(chosen))}: no pair; there are {', '.join(map(repr, there))}")
    count = len(kept) if num_prompts is None else num_prompts // 2
    if count < 1:
        raise InputError(f"num_prompts is {num_prompts}; a pair has two prompts, so give 2 or more")
    if count < len(kept):
        import numpy as np  # here, so that a recipe is read without it

        order = np.sort(np.random.default_rng(seed).permutation(len(kept))[:count])
        kept = [kept[index] for index in order]
    return tuple(kept)
