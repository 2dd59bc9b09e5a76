"""Which donor position answers to which base position when a value is patched from one prompt into another.

Positions are paired only where that is unambiguous: prompts of equal token count, position by position, or named spans
that both prompts have with equal token count, in order (``last`` is the final token of each). Everything else is an
error that shows both tokenisations. Prompts are never aligned from the end.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from nsp.datasets.prompts import Prompt
from nsp.errors import InputError
from nsp.sites import Selection

_ROWS_BEFORE = 4
_ROWS_AFTER = 8
_WIDEST = 32


@dataclass(frozen=True)
class Alignment:
    """The pairing of a base prompt's positions with a donor's.

    Attributes:
        base_length, donor_length: token counts.
        base_to_donor: (base position, donor position) pairs; all positions where the prompts are of equal length.
        shared_prefix: how many leading tokens are the same in both and paired with themselves. Attention is causal, so
            patching at any of these positions changes nothing.
    """

    base_length: int
    donor_length: int
    base_to_donor: tuple[tuple[int, int], ...]
    shared_prefix: int


def align(base: Prompt, donor: Prompt, positions: Selection | None = None) -> Alignment:
    """Pair the base's positions with the donor's, as far as ``positions`` (None: all) needs it.

    Prompts of equal token count are paired position by position. A span that is selected by name is paired with the
    donor's span of that name, wherever it stands.

    Raises:
        InputError: the pairing is ambiguous; the message lists both tokenisations and marks where they part.
    """
    names = () if positions is None else positions.names
    only_names = positions is not None and len(names) == len(positions.items) > 0
    pairs, trouble = _span_pairs(base, donor, names, len(base) == len(donor))
    if not trouble and len(base) == len(donor):
        if not any(here != there for here, there in pairs):
            return _alignment(base, donor, tuple(zip(range(len(base)), range(len(base)), strict=True)))
        if not only_names:
            trouble = "a selected span stands elsewhere in the donor, so it cannot be selected together with indices"
    elif not trouble and not only_names:
        trouble = "their lengths differ"
    if trouble:
        raise InputError(_explain(base, donor, trouble))
    return _alignment(base, donor, pairs)


def _alignment(base: Prompt, donor: Prompt, pairs: tuple[tuple[int, int], ...]) -> Alignment:
    moved = [here for here, there in pairs if here != there]
    return Alignment(len(base), len(donor), pairs, min([_parting(base, donor), *moved]))


def _parting(base: Prompt, donor: Prompt) -> int:
    """The first position where the token ids differ, or the shorter length."""
    for position, (here, there) in enumerate(zip(base.token_ids, donor.token_ids, strict=False)):
        if here != there:
            return position
    return min(len(base), len(donor))


def _span_pairs(
    base: Prompt, donor: Prompt, names: tuple[str, ...], equal_length: bool
) -> tuple[tuple[tuple[int, int], ...], str]:
    """The pairs of all named spans, and what is wrong with them (empty: nothing)."""
    paired: dict[int, int] = {}
    for name in names:
        here, there = base.span(name), donor.named_positions.get(name)
        if there is None:
            if equal_length:  # the donor was given without spans: positions correspond one by one
                there = here
            else:
                return (), f"the donor has no span {name!r}"
        if len(here) != len(there):
            return (), f"the span {name!r} is {_tokens(here)} in the base and {_tokens(there)} in the donor"
        for one, other in zip(here, there, strict=True):
            if paired.setdefault(one, other) != other:
                return (), f"the selected spans pair base position {one} with donor positions {paired[one]} and {other}"
    return tuple(paired.items()), ""


def _tokens(positions: tuple[int, ...]) -> str:
    return f"{len(positions)} token{'s' * (len(positions) != 1)}"


def _explain(base: Prompt, donor: Prompt, trouble: str) -> str:
    part = _parting(base, donor)
    longest = max(len(base), len(donor))
    first, last = max(0, part - _ROWS_BEFORE), min(longest, part + _ROWS_AFTER + 1)
    rows = [(str(row), _cell(base, row), _cell(donor, row)) for row in range(first, last)]
    index_width = max(len("position"), len(str(longest)))
    width = max(_width(text) for _, text, _ in [("", "base", ""), *rows])
    lines = [f"  {'position':>{index_width}}  {_pad('base', width)}  donor"]
    if first > 0:
        lines.append(f"  {'…':>{index_width}}  ({first} more, the same in both)")
    for row, (index, left, right) in enumerate(rows, first):
        mark = "> " if row == part else "  "
        lines.append(f"{mark}{index:>{index_width}}  {_pad(left, width)}  {right}".rstrip())
    if last < longest:
        lines.append(f"  {'…':>{index_width}}  ({longest - last} more)")
    count = f"the base has {len(base)} tokens, the donor {len(donor)}"
    where = f"they part at position {part}" if part < longest else "their tokens are the same"
    return "\n".join(
        [
            f"cannot pair the prompts' positions: {trouble}; {count}, and {where}",
            *lines,
            _way_out(base, donor),
        ]
    )


def _way_out(base: Prompt, donor: Prompt) -> str:
    same = "positions by index" if len(base) == len(donor) else "prompts of equal token count"
    return (
        f"What works: {same}; or positions by the name of a span that both prompts have with equal token count, "
        "for example spans={'subject': '...'} and '@ subject'; or '@ last', the final token of each."
    )


def _cell(prompt: Prompt, position: int) -> str:
    if position >= len(prompt):
        return "(end)" if position == len(prompt) else ""
    text = repr(prompt.token_texts[position]).replace("\\\\x", "\\x")
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _width(text: str) -> int:
    """Columns in a terminal: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))
