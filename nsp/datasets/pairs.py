"""Prompt pairs: a clean and a corrupt prompt that differ in what matters, the answer and the distractor.

A `Pair` is what was written down; `Pair.encode` tokenises it for one model and checks that the answers are single
tokens. Prompts of different length are allowed until positions must be matched (see `nsp.datasets.alignment`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from nsp.datasets.alignment import Alignment, align
from nsp.datasets.prompts import Prompt, PromptLike, SpanLike, check_span_name, encode
from nsp.datasets.table_files import Row, read_rows
from nsp.datasets.tokens import single_token as single_token
from nsp.errors import InputError
from nsp.sites import Selection

PairSpan: TypeAlias = SpanLike | tuple[SpanLike, SpanLike]
PAIR_COLUMNS = ("clean", "corrupt", "answer", "distractor", "name")
_SPAN = "span_"


@dataclass(frozen=True)
class Pair:
    """Two prompts and the answer that they tell apart.

    Attributes:
        clean: the prompt for which the answer is right.
        corrupt: the same prompt, changed so that the answer is wrong.
        answer, distractor: texts that are one token each, with their leading space, or token ids; None where the metric
            needs none.
        spans: (name, piece of text) pairs; the piece is a (clean, corrupt) tuple where the prompts differ in it.
        origin: where the pair was read ("pairs.csv:12"), for messages.
    """

    clean: PromptLike
    corrupt: PromptLike
    answer: str | int | None
    distractor: str | int | None = None
    spans: tuple[tuple[str, PairSpan], ...] = ()
    name: str | None = None
    origin: str | None = field(default=None, compare=False, repr=False)

    def encode(self, tokenizer: Any, *, add_special_tokens: bool = True) -> EncodedPair:
        """The pair as tokens; InputError, which names the pair, where a prompt, a span or an answer is wrong."""
        try:
            prompts = [
                encode(tokenizer, prompt, spans=self.spans_of(side), add_special_tokens=add_special_tokens)
                for side, prompt in (("clean", self.clean), ("corrupt", self.corrupt))
            ]
            answer, distractor = (
                None if text is None else single_token(tokenizer, text, what=what)
                for what, text in (("answer", self.answer), ("distractor", self.distractor))
            )
            if answer is not None and answer == distractor:
                raise InputError(f"answer and distractor are the same token, {self.answer!r}")
        except InputError as error:
            raise InputError(f"{self.label()}: {error}") from None
        return EncodedPair(self, prompts[0], prompts[1], answer, distractor)

    def spans_of(self, side: str) -> dict[str, SpanLike]:
        """The spans of one prompt, ``clean`` or ``corrupt``: name -> piece of text."""
        return {name: _side(piece, side) for name, piece in self.spans}

    def label(self) -> str:
        """The pair's name or origin, or the beginning of its clean prompt, for messages."""
        if self.origin is None and self.name is None:
            return f"pair {self.clean!r:.50}{'…' * (len(repr(self.clean)) > 50)}"
        return f"pair {self.name!r}" if self.origin is None else f"{self.origin}"


@dataclass(frozen=True)
class EncodedPair:
    """A pair as one model reads it: two prompts of dim (position), and token ids."""

    pair: Pair
    clean: Prompt
    corrupt: Prompt
    answer: int | None
    distractor: int | None

    def alignment(
        self, positions: Selection | None = None, *, base: Literal["clean", "corrupt"] = "corrupt"
    ) -> Alignment:
        """The pairing of the base's positions with the other prompt's; InputError where it is ambiguous.

        In denoising the base is the corrupt prompt, in noising the clean one.
        """
        one, other = (self.corrupt, self.clean) if base == "corrupt" else (self.clean, self.corrupt)
        try:
            return align(one, other, positions)
        except InputError as error:
            raise InputError(f"{self.pair.label()}: {error}") from None


def pair(
    clean: PromptLike,
    corrupt: PromptLike,
    answer: str | int | None = None,
    distractor: str | int | None = None,
    spans: Mapping[str, PairSpan] | None = None,
    name: str | None = None,
) -> Pair:
    """Write down a prompt pair.

    Args:
        clean: the prompt for which ``answer`` is right: text, chat messages, token ids, or what a tokenizer returned.
        corrupt: the prompt for which it is wrong.
        answer: one token, with its leading space where the model's tokens have one: ``" Mary"``.
        distractor: one token, the answer of the corrupt prompt; ``logit_diff`` needs it.
        spans: name -> a piece of text that occurs once in each prompt, or a (clean, corrupt) tuple of two such pieces.
        name: a name for the pair in messages and results.
    """
    return _checked(Pair(clean, corrupt, answer, distractor, tuple((spans or {}).items()), name))


def read_pairs(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Pair]:
    """Read pairs from a UTF-8 file: csv, tsv, jsonl, or a json list of objects.

    Columns (or keys): ``clean`` and ``corrupt``, and where there are any ``answer``, ``distractor``, ``name``, and
    ``span_<name>`` for a piece of text that both prompts hold, or ``span_<name>_clean`` with ``span_<name>_corrupt``.
    Other columns are ignored. In json, prompts may be chat messages or token ids, answers token ids, and ``spans`` an
    object as `pair` takes it.

    Args:
        columns: nsp's name -> the file's name, for files with other names: ``{"clean": "sent_more"}``.

    Raises:
        InputError: a missing file or column, or a malformed row; the message names file and line.
    """
    columns = dict(columns or {})
    for key in columns:
        if key not in PAIR_COLUMNS and not key.startswith(_SPAN):
            raise InputError(f"columns: nsp has no {key!r}; it has {', '.join(PAIR_COLUMNS)} and span_<name>")
    return [_from_row(row, columns) for row in read_rows(path)]


def _from_row(row: Row, columns: dict[str, str]) -> Pair:
    values = {ours: value for ours, value in row.values.items() if ours not in columns.values()}
    for ours in {"clean", "corrupt", *columns}:
        theirs = columns.get(ours, ours)
        if theirs not in row.values:
            raise InputError(
                f"{row.where}: there is no column {theirs!r} for {ours}; there are {', '.join(map(repr, row.values))}; "
                f'name another with columns={{"{ours}": "..."}}'
            )
        values[ours] = row.values[theirs]
    pair = Pair(
        values["clean"],
        values["corrupt"],
        values.get("answer"),
        values.get("distractor") if values.get("distractor") != "" else None,
        _row_spans(row.where, values),
        values.get("name") or None,
        row.where,
    )
    try:
        return _checked(pair)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None


def _row_spans(where: str, values: dict[str, Any]) -> tuple[tuple[str, PairSpan], ...]:
    """The spans of a row's columns; an empty cell is a span that this pair does not have."""
    pieces = {key.removeprefix(_SPAN): value for key, value in values.items() if key.startswith(_SPAN) and value}
    given = values.get("spans") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: spans is {given!r:.60}; give an object of name and text, or columns span_<name>")
    spans: dict[str, PairSpan] = {
        name: tuple(piece) if isinstance(piece, list) else piece for name, piece in given.items()
    }
    for name, piece in pieces.items():
        stem, _, side = name.rpartition("_")
        if stem and side in ("clean", "corrupt"):
            if not {f"{stem}_clean", f"{stem}_corrupt"} <= pieces.keys():
                raise InputError(f"{where}: span_{stem}_clean and span_{stem}_corrupt go together; one is missing")
            spans[stem] = (pieces[f"{stem}_clean"], pieces[f"{stem}_corrupt"])
        else:
            spans[name] = tuple(piece) if isinstance(piece, list) else piece
    return tuple(spans.items())


def _checked(pair: Pair) -> Pair:
    """The pair, where its parts are of the right kind; texts are checked against a tokenizer later."""
    for side, prompt in (("clean", pair.clean), ("corrupt", pair.corrupt)):
        if prompt is None or (isinstance(prompt, str) and not prompt):
            raise InputError(f"{side} is empty; give a prompt")
        if isinstance(prompt, float | int | bool) or (isinstance(prompt, Mapping) and "input_ids" not in prompt):
            raise InputError(f"{side} is {prompt!r}; a prompt is text, a list of chat messages or token ids")
    for what, text in (("answer", pair.answer), ("distractor", pair.distractor)):
        if text is not None and (isinstance(text, bool) or not (isinstance(text, str) or hasattr(text, "__index__"))):
            raise InputError(f"{what} is {text!r}; give a text that is one token, or a token id")
        if text == "":
            raise InputError(f"{what} is empty; give a text that is one token, or a token id")
    for name, piece in pair.spans:
        check_span_name(name)
        for side in ("clean", "corrupt"):
            one = _side(piece, side)
            if not isinstance(one, str | tuple) or not one:
                raise InputError(
                    f"span {name!r} is {piece!r}; give a piece of text, or a (clean, corrupt) tuple of two"
                )
    if pair.name is not None and not isinstance(pair.name, str):
        raise InputError(f"name is {pair.name!r}; it must be text")
    return pair


def _side(piece: Any, side: str) -> SpanLike:
    """One prompt's piece of a span: both have the same, unless it is a tuple of two."""
    both = isinstance(piece, tuple) and len(piece) == 2 and not all(isinstance(part, int) for part in piece)
    own: SpanLike = piece[0 if side == "clean" else 1] if both else piece
    return own
