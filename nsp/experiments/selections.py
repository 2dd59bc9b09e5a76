"""Selections in recipes, kept as text in the selector grammar: ``all``, ``3``, ``1,4``, ``2:8``, ``subject``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

_INDEX = re.compile(r"-?\d+|(-?\d+)?:(-?\d+)?(:-?\d+)?")
SPAN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_EXAMPLES = "write all, 3, [1, 4] or 2:8"


def _selection(value: Any, *, spans: bool) -> str:
    """A selection as text: ``all``, or indices, slices (and span names) between commas."""
    items = value if isinstance(value, list | tuple) else [value]
    examples = _EXAMPLES + (", last or the name of a span" if spans else "")
    if not items:
        raise ValueError(f"selects nothing; {examples}")
    if any(isinstance(item, bool) or not isinstance(item, int | str) for item in items):
        raise ValueError(f"{value!r} is no selection; {examples}")
    words = [word.strip() for item in items for word in str(item).split(",")]
    if words in (["all"], ["*"]):
        return "all"
    for word in words:
        if not (_INDEX.fullmatch(word) or (spans and SPAN_NAME.fullmatch(word) and word != "all")):
            raise ValueError(f"{word!r} is no index or slice; {examples}")
        start, _, rest = word.partition(":")
        stop, _, step = rest.partition(":")
        if step and int(step) == 0:
            raise ValueError(f"the slice {word!r} has step 0")
        if start.isdigit() and stop.isdigit() and int(step or 1) > 0 and int(start) >= int(stop):
            raise ValueError(f"the slice {word!r} selects nothing: it ends before {stop}")
    return ",".join(words)


def _indices(value: Any) -> str:
    return _selection(value, spans=False)


def places(value: Any) -> str:
    """A selection of positions as text."""
    return _selection(value, spans=True)


def _optional(check: Callable[[Any], str]) -> Callable[[Any], str | None]:
    return lambda value: None if value is None else check(value)


def listed(value: Any) -> Any:
    """A list, also where one item was given alone."""
    return [value] if isinstance(value, str | dict) else value


def as_list(value: Any) -> list[Any]:
    """A list, also where one item of any kind was given alone."""
    alone = isinstance(value, str | Mapping | BaseModel) or not isinstance(value, Iterable)
    return [value] if alone else list(value)


Indices = Annotated[str, BeforeValidator(_indices, json_schema_input_type=str | int | list[int | str])]
Positions = Annotated[str, BeforeValidator(places, json_schema_input_type=str | int | list[int | str])]
Units = Annotated[
    str | None, BeforeValidator(_optional(_indices), json_schema_input_type=str | int | list[int | str] | None)
]
