"""What pydantic found wrong with a recipe, said in the recipe's own terms: file, line, key, and what would be valid."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from nsp.recipe_yaml import Document, Place, Where

FILE_KEYS = ("extends", "matrix")
"""Keys of a recipe file that are gone by the time the recipe is validated."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'metric'?`` where a known word is spelt much like `word`, else nothing."""
    spoken = {_folded(name): name for name in known}
    close = difflib.get_close_matches(_folded(word), spoken, n=1, cutoff=0.6)
    return f"; did you mean {spoken[close[0]]!r}?" if close else ""


def problem_at(place: Place, message: str) -> PydanticCustomError:
    """An error for a validator of a whole model to raise, about one place inside it."""
    return PydanticCustomError("recipe", "{message}", {"message": message, "place": place})


def describe_problems(error: ValidationError, document: Document, recipe: type[BaseModel]) -> list[str]:
    """One line for each thing wrong, in the order of the file."""
    found: list[tuple[Where, str]] = []
    details = error.errors(include_url=False)
    guesses = set()  # missing keys that an unknown key beside them was meant to be
    for detail in details:
        if detail["type"] == "extra_forbidden":
            *parent, key = detail["loc"]
            guess = suggestion(str(key), _keys(recipe, tuple(parent)))
            guesses.add((_place(tuple(parent), document.data), guess))
    for detail in details:
        kind, loc, context = detail["type"], detail["loc"], detail.get("ctx", {})
        if kind == "too_short" and any(other["loc"][: len(loc)] == loc != other["loc"] for other in details):
            continue  # pydantic counts only the items without problems of their own
        if kind == "missing":
            place = _place(loc[:-1], document.data)
            if (place, suggestion(str(loc[-1]), [str(loc[-1])])) not in guesses:
                found.append((document.locate(place), f"missing key {str(loc[-1])!r}{_inside(place)}"))
            continue
        inner = context.get("place", ()) if isinstance(context, Mapping) else ()
        place = _place((*loc, *inner), document.data)
        if kind == "extra_forbidden":
            known = [*_keys(recipe, loc[:-1]), *(FILE_KEYS if len(loc) == 1 else ())]
            hint = suggestion(str(loc[-1]), known) or f"; valid here: {', '.join(known)}"
            message = f"unknown key {str(loc[-1])!r}{_inside(place[:-1])}{hint}"
        else:
            message = _message(kind, detail["msg"], detail["input"], context)
            message = f"{dotted(place)}: {message}" if place else message
        found.append((document.locate(place), message))
    found.sort(key=lambda item: item[0])
    return list(dict.fromkeys(f"{where}: {message}" for where, message in found))


def dotted(place: Place) -> str:
    """A place as a person writes it: ``pairs[0].clean``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def _message(kind: str, message: str, value: Any, context: Mapping[str, Any]) -> str:
    if kind in ("literal_error", "enum"):
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        hint = suggestion(str(value), choices)
        return f"{value!r} is not valid{hint} (one of {', '.join(choices)})"
    if kind in ("value_error", "assertion_error") and "error" in context:
        return str(context["error"])
    if kind == "recipe":
        return message
    if kind == "string_type":
        return f"should be a text, got {value!r}" + ("" if isinstance(value, dict | list) else " (write it in quotes)")
    if kind in ("too_short", "string_too_short"):
        return "should not be empty"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be a mapping of keys to values"
    message = message.removeprefix("Input ").replace("tuple", "list")
    message = re.sub(r"^List should", "should", message)
    shown = repr(value)
    return f"{message}, got {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _place(loc: tuple[int | str, ...], data: Any) -> Place:
    """The place in the data that a pydantic location means; pydantic's own marks (which branch of a union) fall out."""
    place: list[int | str] = []
    for part in loc:
        if (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            place.append(part)
            inside: Any = data
            data = inside[part]
    return tuple(place)


def _inside(place: Place) -> str:
    return f" in {dotted(place)}" if place else ""


def _keys(recipe: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid in the mapping at a pydantic location."""
    models = [recipe]
    for part in loc:
        named = [model for model in models if model.__name__ == part]
        if named:
            models = named
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models(field.annotation)]
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _folded(word: str) -> str:
    return word.lower().replace("-", "_")
