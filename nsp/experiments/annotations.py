"""The Python type of a recipe's key, as text: what a door's signature and the stub of `nsp.experiments` say.

A key's validators turn several spellings into one form; pydantic knows the spellings as the input type of its schema.
An options class names the live objects that stand for it in ``python_types``; a key that takes some beside plain values is
annotated with `LiveObjects`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


@dataclass(frozen=True)
class LiveObjects:
    """The types of objects that a key takes in Python, for its annotation: ``Annotated[str, LiveObjects("TunedLens")]``."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


def python_type(field: FieldInfo) -> str:
    """The type of a field, such as ``Literal['denoising', 'noising']`` or ``str | int | Sequence[int | str]``."""
    live = [name for extra in field.metadata if isinstance(extra, LiveObjects) for name in extra.names]
    return " | ".join(dict.fromkeys([*live, *_spellings(field.annotation, field.metadata)]))


def _spellings(annotation: Any, metadata: Any = ()) -> list[str]:
    """The members of the union that a type is, as texts."""
    for validator in metadata:
        spelled = getattr(validator, "json_schema_input_type", PydanticUndefined)
        if spelled is not PydanticUndefined:
            return _spellings(spelled)
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        return _spellings(inner, extra)
    if origin in (Union, types.UnionType):
        members = [text for member in get_args(annotation) for text in _spellings(member)]
        members = list(dict.fromkeys(members))
        return [text for text in members if text != "None"] + [text for text in members if text == "None"]
    if origin is Literal:
        return [f"Literal[{', '.join(map(repr, get_args(annotation)))}]"]
    if origin in (tuple, list):
        item = " | ".join(_spellings(get_args(annotation)[0]))
        return [f"Sequence[{item}]"]
    if origin is dict:
        key, value = (" | ".join(_spellings(part)) for part in get_args(annotation))
        return [f"Mapping[{key}, {value}]"]
    if annotation is type(None) or annotation is None:
        return ["None"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [*getattr(annotation, "python_types", ()), "Mapping[str, Any]"]
    if isinstance(annotation, type) and annotation.__module__ == "builtins":
        return [annotation.__name__]
    if isinstance(annotation, type) and issubclass(annotation, Mapping):
        return ["Mapping[str, Any]"]
    return ["Any"]
