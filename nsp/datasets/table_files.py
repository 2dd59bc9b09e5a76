"""Rows of a table file: csv, tsv, jsonl, or a json list of objects, each row with its file and line for messages."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsp.errors import InputError


@dataclass(frozen=True)
class Row:
    """One row: its values by column name, and where it was read ("pairs.csv:12")."""

    where: str
    values: dict[str, Any]


def is_table(path: str | Path) -> bool:
    """Whether a file's ending says that it holds rows."""
    return Path(path).suffix.lower() in _READERS


def read_rows(path: str | Path, *, blank_rows: bool = False) -> list[Row]:
    """The rows of a UTF-8 file whose ending says its format; empty lines are skipped.

    Args:
        blank_rows: keep rows of a csv or tsv file whose cells hold nothing but spaces, for a caller that names them.

    Raises InputError with file and line: no such file, an unknown ending, bytes that are no UTF-8, a malformed row, no
    rows.
    """
    path = Path(path)
    if not is_table(path):
        raise InputError(f"{path}: cannot tell the format; files are read from {', '.join(_READERS)}")
    rows = list(_READERS[path.suffix.lower()](path, read_text(path), blank_rows))
    if not rows:
        raise InputError(f"{path}: the file has no rows")
    return rows


def read_text(path: str | Path) -> str:
    """A UTF-8 file as text; InputError names the byte or the system's reason."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise InputError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None


def text_lines(text: str) -> list[str]:
    """The lines of a text: they end at \\n, \\r\\n or \\r, and at no other character that Unicode calls a line's end."""
    return _LINE_END.split(text)


def csv_lines(
    text: str, delimiter: str, *, blank_rows: bool = False
) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
    """(first line, last line, cells) of every row of a csv text; the error in place of malformed cells.

    Between commas a quoted cell may hold commas, quotes and line ends (RFC 4180); a quote that is not closed makes a
    malformed row of every line that it reaches over. Between tabs a line is a row, and quotes are text like any other
    unless they enclose the whole cell. Rows of nothing but spaces are skipped, or with ``blank_rows`` only empty lines.
    """
    if delimiter == "\t":
        for number, content in enumerate(text_lines(text), 1):
            cells = [_unquoted(cell) for cell in content.split("\t")]
            if content if blank_rows else any(cell.strip() for cell in cells):
                yield number, number, cells
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except csv.Error as error:
            yield line, reader.line_num, error
            continue
        except StopIteration:
            return
        if cells if blank_rows else any(cell.strip() for cell in cells):
            yield line, reader.line_num, cells


def _unquoted(cell: str) -> str:
    """A cell of a tsv file as its text: without the quotes that enclose all of it, doubled ones inside single."""
    inner = cell[1:-1]
    enclosed = len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if enclosed else cell


def _delimited(path: Path, text: str, blank_rows: bool) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    header: list[str] | None = None
    for line, _, cells in csv_lines(text, delimiter, blank_rows=blank_rows):
        if isinstance(cells, csv.Error):
            raise InputError(f"{path}:{line}: malformed row: {cells}") from None
        if header is None:
            header = _header(f"{path}:{line}", cells)
        elif len(cells) != len(header):
            raise InputError(
                f"{path}:{line}: the row has {len(cells)} cells, the header {len(header)} columns; "
                f"put text that holds {delimiter!r} into double quotes"
            )
        else:
            yield Row(f"{path}:{line}", dict(zip(header, cells, strict=True)))


def _header(where: str, cells: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{where}: the header has the column {twice[0]!r} more than once")
    return header


def _json_lines(path: Path, text: str, _: bool) -> Iterator[Row]:
    for line, content in enumerate(text_lines(text), 1):
        if content.strip():
            where = f"{path}:{line}"
            try:
                value = _DECODER.decode(content)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
            except ValueError as error:
                raise InputError(f"{where}: {error}") from None
            yield _object(where, value)


def _json_list(path: Path, text: str, _: bool) -> Iterator[Row]:
    try:
        values = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(values, list):
        raise InputError(f"{path}:1: expected a list of objects, found {type(values).__name__}")
    at = text.index("[") + 1
    for _ in values:
        while text[at] in " \t\r\n,":
            at += 1
        where = f"{path}:{text.count(chr(10), 0, at) + 1}"
        value, at = _DECODER.raw_decode(text, at)
        yield _object(where, value)


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(f'{where}: expected an object such as {{"clean": ..., "corrupt": ...}}, found {value!r:.60}')
    return Row(where, value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return values


_LINE_END = re.compile(r"\r\n|\r|\n")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_READERS: dict[str, Callable[[Path, str, bool], Iterator[Row]]] = {
    ".csv": _delimited, ".tsv": _delimited, ".jsonl": _json_lines, ".json": _json_list, ".ndjson": _json_lines,
}  # fmt: skip
