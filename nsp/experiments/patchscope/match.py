"""Does a generated text name or describe an entity? Normalised matching of phrases, as whole words.

Texts and phrases are compared without case, accents and punctuation. A match is ``strong`` where a telling phrase is
there, ``partial`` where only a phrase is that many entities share, else ``failed``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

CLASSES = ("failed", "partial", "strong")
"""What a match class stands for; -1 is a cell that did not run."""
FAILED, PARTIAL, STRONG = range(3)

_EDGE = r"(?<![^\W_]){}(?![^\W_])"


@dataclass(frozen=True)
class Expected:
    """What a text should say: phrases that tell the entity, and phrases that many share."""

    strong: tuple[str, ...]
    partial: tuple[str, ...] = ()


def normalised(text: str) -> str:
    """``text`` without case, accents and punctuation, its words one space apart."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(char if char.isalnum() else " " for char in plain if not unicodedata.combining(char))
    return " ".join(kept.split())


def says(text: str, phrase: str) -> bool:
    """Whether ``phrase`` stands in ``text`` as whole words; ``*`` at a word's end stands for any letters."""
    return _pattern(phrase).search(normalised(text)) is not None


def match_class(text: str, expected: Expected) -> int:
    """The class of a text, as a number (see `CLASSES`)."""
    plain = normalised(text)
    if _any(plain, expected.strong):
        return STRONG
    return PARTIAL if _any(plain, expected.partial) else FAILED


def answer_part(text: str, separator: str) -> str:
    """The part of a text that answers: up to the separator with which a few-shot prompt would begin its next item."""
    begun = text.lstrip()
    return begun.partition(separator)[0] if separator else begun


def _any(plain: str, phrases: Sequence[str]) -> bool:
    return any(_pattern(phrase).search(plain) is not None for phrase in phrases)


@lru_cache(maxsize=4096)
def _pattern(phrase: str) -> re.Pattern[str]:
    words = []
    for word in phrase.split():
        stem = normalised(word.rstrip("*"))
        if stem:
            words.append(re.escape(stem) + (r"\w*" if word.endswith("*") else ""))
    # A phrase of signs alone has no words to find; it matches nothing.
    return re.compile(_EDGE.format(" ".join(words)) if words else r"(?!)")
