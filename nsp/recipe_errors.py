"""What pydantic found wrong with a recipe, said in the recipe's own terms: file, line, key, and what would be valid."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from nsp.errors import InputError, suggestion
from nsp.recipe_yaml import Document, Place, SourceMapping, Where

Checked = TypeVar("Checked", bound=BaseModel)
Loc = tuple[int | str, ...]

FILE_KEYS = ("extends", "matrix")
"""Keys of a recipe file that are gone by the time the recipe is validated."""


def problem_at(place: Place, message: str) -> PydanticCustomError:
    """An error for a validator of a whole model to raise, about one place inside it."""
    return PydanticCustomError("recipe", "{message}", {"message": message, "place": place})


def checked(form: type[Checked], keys: Mapping[str, Any], name: str = "") -> Checked:
    """A recipe, or a part of one, from Python values; InputError with a line for each thing wrong, headed by ``name``
    or the recipe's kind."""
    try:
        return form.model_validate(keys)
    except ValidationError as error:
        document = Document(SourceMapping(keys), name or str(keys["kind"]))
        raise InputError("\n".join(describe_problems(error, document, form))) from None


def describe_problems(error: ValidationError, document: Document, recipe: type[BaseModel]) -> list[str]:
    """One line for each thing wrong, in the order of the file."""
    details = _own(error.errors(include_url=False), document.data)
    keys = [
        detail
        for detail in details
        if detail["type"] in ("missing", "extra_forbidden") and not isinstance(detail["loc"][-1], int)
    ]
    values = [
        detail
        for detail in details
        # Of too short a list pydantic counts only the items without problems of their own.
        if detail not in keys
        and (detail["type"] != "too_short" or not any(_is_inside(other["loc"], detail["loc"]) for other in details))
    ]
    problems = sorted([*_key_problems(keys, document, recipe), *_value_problems(values, document)], key=lambda item: item[0])
    return list(dict.fromkeys(f"{where}: {message}" for where, message in problems))


def _own(details: Sequence[ErrorDetails], data: Mapping[str, Any]) -> list[ErrorDetails]:
    """Without what a validator made of one key and put under another that was not written: it is wrong under its own."""
    def is_written(loc: Loc) -> bool:
        return not loc or _place(loc, data)[-1:] == loc[-1:]

    written = {(detail["type"], detail["loc"][-1]) for detail in details if detail["loc"] and is_written(detail["loc"])}
    return [
        detail
        for detail in details
        if len(detail["loc"]) < 2 or is_written(detail["loc"]) or (detail["type"], detail["loc"][-1]) not in written
    ]


def _is_inside(inner: Loc, outer: Loc) -> bool:
    return inner[: len(outer)] == outer != inner


def _key_problems(
    details: Sequence[ErrorDetails], document: Document, recipe: type[BaseModel]
) -> Iterator[tuple[Where, str]]:
    """Keys that are unknown and keys that are missing; an unknown one takes the blame for what is missing beside it."""
    missing: dict[Place, list[str]] = defaultdict(list)
    for detail in details:
        if detail["type"] == "missing":
            missing[_place(detail["loc"][:-1], document.data)].append(str(detail["loc"][-1]))
    for detail in details:
        if detail["type"] == "missing":
            continue
        *around, key = detail["loc"]
        place, word = _place(tuple(around), document.data), str(key)
        known = [*_keys(recipe, around), *(FILE_KEYS if not around and document.data.where else ())]
        hint = suggestion(word, known)
        meant = [name for name in missing[place] if suggestion(word, known) == suggestion(word, [name]) != ""]
        if not hint:
            meant = list(missing[place])
            needed = f"; missing here: {', '.join(map(repr, meant))}" if meant else ""
            hint = f"{needed}; valid here: {', '.join(known)}"
        for name in meant:
            missing[place].remove(name)
        yield document.locate((*place, word)), f"unknown key {word!r}{_inside(place)}{hint}"
    for place, names in missing.items():
        for name in names:
            yield document.locate(place), f"missing key {name!r}{_inside(place)}"


def _value_problems(details: Sequence[ErrorDetails], document: Document) -> Iterator[tuple[Where, str]]:
    """Values that are wrong. Where a key takes several forms, pydantic tries each: that is one mistake, not several."""
    by_place: dict[Place, list[ErrorDetails]] = defaultdict(list)
    for detail in details:
        context = detail.get("ctx", {})
        inner = context.get("place", ()) if isinstance(context, Mapping) else ()
        by_place[_place((*detail["loc"], *inner), document.data)].append(detail)
    for place, alike in by_place.items():
        forms = len(alike) > 1 or len(alike[0]["loc"]) > len(place)
        if forms and any(_is_inside(other, place) for other in by_place):
            continue  # of the forms it takes one was meant, and what is wrong inside that one is said there
        either = _either(alike) if len(alike) > 1 else None
        for message in [either] if either else [_message(each, quotable=bool(document.data.where)) for each in alike]:
            yield document.locate(place), f"{dotted(place)}: {message}" if place else message


def _either(details: Sequence[ErrorDetails]) -> str | None:
    """What a value of several forms should have been; None where the details are no forms of one value."""
    if len({detail["loc"] for detail in details}) < len(details):
        return None
    said = [(_wanted(detail), detail) for detail in details]
    own = [detail for wanted, detail in said if wanted is None]
    if own:
        return _message(own[0], quotable=False)  # of the form that the value has, what else is wrong with it
    choices = list(dict.fromkeys(str(wanted) for wanted, _ in said))
    return f"should be {', or '.join(choices)}, got {_shown(details[0]['input'])}"


def _wanted(detail: ErrorDetails) -> str | None:
    """What a value should have been, in a few words; None where the error says something else."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return ", ".join(_choices(context))
    if kind in _FORMS:
        return _FORMS[kind].format(**context)
    match = re.match(r"should be (.+?)(, got .*)?$", _message(detail, quotable=False), flags=re.DOTALL)
    return match[1] if match else None


_WHOLE = "a whole number"
_FORMS = {
    "string_type": "a text", "int_type": _WHOLE, "int_parsing": _WHOLE, "int_from_float": _WHOLE, "float_type": "a number",
    "float_parsing": "a number", "list_type": "a list", "tuple_type": "a list", "greater_than_equal": "{ge} or more",
    "less_than_equal": "at most {le}", "greater_than": "more than {gt}", "less_than": "less than {lt}",
}  # fmt: skip


def dotted(place: Place) -> str:
    """A place as a person writes it: ``pairs[0].clean``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def _message(detail: ErrorDetails, *, quotable: bool) -> str:
    kind, message, value, context = detail["type"], detail["msg"], detail["input"], detail.get("ctx", {})
    if kind in ("literal_error", "enum"):
        choices = _choices(context)
        hint = suggestion(str(value), choices)
        return f"{value!r} is not valid{hint} (one of {', '.join(choices)})"
    if kind in ("value_error", "assertion_error") and "error" in context:
        return str(context["error"])
    if kind == "recipe":
        return message
    if kind == "missing":
        return "has too few items"  # a key that is missing is said elsewhere
    if kind == "string_type":
        quotes = quotable and not isinstance(value, dict | list)
        return f"should be a text, got {value!r}" + (" (write it in quotes)" if quotes else "")
    if kind in ("too_short", "string_too_short"):
        return "should not be empty"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be a mapping of keys to values"
    message = message.removeprefix("Input ").replace("tuple", "list")
    message = re.sub(r"^List should", "should", message)
    return f"{message}, got {_shown(value)}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _choices(context: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context.get("expected", "")))


def _place(loc: Loc, data: Any) -> Place:
    """The place in the data that a pydantic location means; pydantic's own marks (which branch of a union) fall out."""
    place: list[int | str] = []
    for part in loc:
        if (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            place.append(part)
            inside: Any = data
            data = inside[part]
    return tuple(place)


def _inside(place: Place) -> str:
    return f" in {dotted(place)}" if place else ""


def _keys(recipe: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
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
