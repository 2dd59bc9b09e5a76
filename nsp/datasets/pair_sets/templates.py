"""What the families of built-in pair sets are made of: templates with slots, and drafts that no tokenizer has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from string import Formatter
from typing import TypeAlias

from nsp.datasets.pairs import Pair, PairSpan

Answers: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Draft:
    """One item before the token checks.

    Attributes:
        template: which of the family's templates it is of, for the pair's name.
        pair: the prompts and their spans (one per slot); its answers are the first of ``answers``.
        answers: (answer, distractor), in the spellings to try in turn, since tokenizers differ in where a space goes.
        single: slots that must be one token each, so that all items of a template have one length.
    """

    template: str
    pair: Pair
    answers: Answers
    single: tuple[str, ...]


@dataclass(frozen=True)
class PairSetKind:
    """A built-in set: what it asks of a model, and how its drafts are made.

    Attributes:
        drafts: drafts from a seeded generator, without end, and sometimes the same again.
    """

    name: str
    description: str
    default_size: int
    drafts: Callable[[Random], Iterator[Draft]]


def draft(
    template: str,
    text: str,
    clean: Mapping[str, str],
    corrupt: Mapping[str, str],
    answers: Answers,
    *,
    single: tuple[str, ...] | None = None,
) -> Draft:
    """Fill the slots of a text for the clean and for the corrupt prompt.

    Args:
        text: with slots such as ``{country}``; each becomes a span of the same name.
        clean, corrupt: slot -> word; slots that are not in ``corrupt`` are as in ``clean``.
        single: slots that must be one token, by default all.
    """
    clean_text, clean_spans = fill(text, clean)
    corrupt_text, corrupt_spans = fill(text, {**clean, **corrupt})
    spans: dict[str, PairSpan] = {slot: (clean_spans[slot], corrupt_spans[slot]) for slot in clean_spans}
    answer, distractor = answers[0]
    pair = Pair(clean_text, corrupt_text, answer, distractor, tuple(spans.items()))
    return Draft(template, pair, answers, tuple(spans) if single is None else single)


def fill(text: str, words: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """The text with its slots filled, and where each slot's word is: slot -> (start, stop) in characters."""
    filled, spans = "", {}
    for literal, slot, _, _ in Formatter().parse(text):
        filled += literal
        if slot is not None:
            spans[slot] = (len(filled), len(filled) + len(words[slot]))
            filled += words[slot]
    return filled, spans


def listed(words: str) -> tuple[str, ...]:
    """Words between spaces."""
    return tuple(words.split())


def words_after_space(answer: str, distractor: str) -> Answers:
    """Answers that follow a space: with it for most tokenizers, without it for those that add it to every text."""
    return (f" {answer}", f" {distractor}"), (answer, distractor)
