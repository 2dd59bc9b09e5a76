"""Errors that a user meets: one clear message that names what is wrong and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NspError(Exception):
    """A run failed for a reason that nsp can name. Exit code 1."""

    exit_code = 1


class InputError(NspError, ValueError):
    """What the user asked for is wrong or impossible; the message says what would be valid. Exit code 2."""

    exit_code = 2


class BackendError(NspError):
    """A server, or the way there, failed; finished work is in the store, and ``--resume`` goes on. Exit code 1."""


def suggestion(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean 'metric'?`` where a known word is spelt much like ``word``, else nothing.

    Case does not matter, nor whether words are joined by - or _. ``cutoff`` is the least likeness, from 0 to 1.
    """

    def folded(text: str) -> str:
        return text.lower().replace("-", "_")

    spelt = {folded(name): name for name in known}
    close = difflib.get_close_matches(folded(word), spelt, n=1, cutoff=cutoff)
    return f"; did you mean {spelt[close[0]]!r}?" if close else ""
