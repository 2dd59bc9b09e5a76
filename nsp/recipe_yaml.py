"""YAML text as plain data that remembers where each key was written, and the few ways in which such data combine.

YAML 1.2 is read (``0:6`` and ``yes`` are texts). Duplicate keys, merge keys and tags are errors, never silently
resolved. Every text remembers the directory that it was written for (`SourceText`), so that a relative path in a recipe
is resolved against the file that holds it, whichever recipe extends that file.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from nsp.errors import InputError

Place = tuple[str | int, ...]
_OPEN_SLICE = re.compile(r"-?\d*:(-?\d+)?(:-?\d*)?")
"""The keys and list indices that lead to a value."""

SHORTHAND: Mapping[Place, str] = {("model",): "name", ("metric",): "kind"}
"""Keys where a bare text stands for a mapping with this one key: ``model: gpt2`` is ``model: {name: gpt2}``."""

_TAGS = "tag:yaml.org,2002:"
_SCALARS = {_TAGS + name for name in ("null", "bool", "int", "float")}
_OTHERS = {_TAGS + name for name in ("str", "map", "seq", "timestamp")}  # a date is a text here


class SourceText(str):
    """A text that knows the directory against which it is resolved, should it turn out to be a relative path."""

    base: Path

    def __new__(cls, text: str, base: Path = Path()) -> SourceText:
        made = super().__new__(cls, text)
        made.base = base
        return made


@dataclass(frozen=True, order=True)
class Where:
    """Where something was written: a file and a line, or a command-line option."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Document:
    """A mapping, and the place in the source of every key and list item in it."""

    data: dict[str, Any]
    where: dict[Place, Where]
    source: str

    def locate(self, place: Place) -> Where:
        """Where `place`, or the nearest thing around it, was written."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.where:
                return self.where[place[:end]]
        return Where(self.source)

    def get(self, place: Place) -> Any:
        """The value at `place`; KeyError or IndexError where there is none."""
        value: Any = self.data
        for part in place:
            value = value[part]
        return value


def read_document(path: Path) -> Document:
    """Read a YAML file whose top is a mapping. InputError names file and line of everything that is malformed."""
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no such recipe: {source}") from None
    except IsADirectoryError:
        raise InputError(f"{source} is a directory; a recipe is a YAML file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is no UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from None
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise InputError(f"{Where(source, line)}: not valid YAML: {_problem(error)}") from None
    except YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(node, MappingNode):
        raise InputError(f"{source}: a recipe is a mapping of keys to values (kind: ..., model: ...)")
    builder = _Builder(source, Path(os.path.abspath(path)).parent)
    data = builder.value(node, ())
    if builder.problems:
        raise InputError("\n".join(builder.problems))
    return Document(data, builder.where, source)


def read_setting(setting: str, option: str = "--set") -> tuple[Place, Any, Where]:
    """Read one ``key=value`` of the command line: the place that the dotted key names, the YAML value, the source."""
    where = Where(f"{option} {setting}")
    key, equals, text = setting.partition("=")
    place: Place = tuple(key.strip().split("."))
    if not equals or not all(place):
        raise InputError(f"{where}: expected key=value, for example --set model=gpt2 or --set pairs.path=pairs.csv")
    if _OPEN_SLICE.fullmatch(text.strip()):
        return place, text.strip(), where  # YAML would read "1:" as a mapping
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except YAMLError as error:
        raise InputError(
            f"{where}: the value is not valid YAML ({_problem(error)}); put text in quotes: {key}='\"...\"'"
        ) from None
    if node is None:
        return place, None, where
    builder = _Builder(str(where), Path.cwd(), lines=False)
    value = builder.value(node, ())
    if builder.problems:
        raise InputError("\n".join(builder.problems))
    return place, value, where


def merge(base: Document, over: Document) -> Document:
    """`over` on top of `base`: mappings merge key by key, anything else replaces.

    A key that `over` gives as one value ends an axis of the base's ``matrix`` over the same key.
    """
    data, where = copy.deepcopy(base.data), dict(base.where)
    axes = data.get("matrix")
    if isinstance(axes, dict):
        listed = over.data.get("matrix")
        kept = {
            key: values
            for key, values in axes.items()
            if (isinstance(listed, dict) and key in listed) or not _holds(over.data, tuple(key.split(".")))
        }
        data["matrix"] = kept
    _merge_into(data, over.data, (), where, over.where)
    return Document(data, where, over.source)


def assign(document: Document, place: Place, value: Any, where: Where) -> Document:
    """`document` with `value` at `place`; mappings on the way are made, and a list is entered by index."""
    data, places = copy.deepcopy(document.data), dict(document.where)
    here: Any = data
    for depth, part in enumerate(place):
        done: Place = place[:depth]
        if isinstance(here, list):
            if not (isinstance(part, str) and part.isdigit() and int(part) < len(here)):
                raise InputError(
                    f"{where}: {'.'.join(map(str, done))} has {len(here)} item(s), counted from 0; there is no {part!r}"
                )
            part = int(part)
            place = (*done, part, *place[depth + 1 :])
        if depth == len(place) - 1:
            break
        inner = here[part] if isinstance(part, int) or part in here else {}
        following = str(place[depth + 1])
        enterable = isinstance(inner, dict) or (isinstance(inner, list) and following.isdigit())
        if not enterable:
            shorthand = SHORTHAND.get(place[: depth + 1])
            inner = {shorthand: inner} if shorthand and isinstance(inner, str) else {}
        here[part] = inner
        here = inner
    here[place[-1]] = copy.deepcopy(value)
    for known in [known for known in places if known[: len(place)] == place]:
        del places[known]
    places[place] = where
    return Document(data, places, document.source)


def matrix_cells(
    document: Document, fixed: frozenset[Place] = frozenset()
) -> Iterator[tuple[dict[str, Any], Document]]:
    """Every combination of the values listed under ``matrix``: the cell's values by key, and the document with them.

    Axes over a place in `fixed` are left out. Without a matrix there is one cell, with no values.
    """
    axes = document.data.get("matrix")
    data = {key: value for key, value in document.data.items() if key != "matrix"}
    bare = Document(
        data, {place: where for place, where in document.where.items() if place[0] != "matrix"}, document.source
    )
    if axes is None:
        axes = {}
    if not isinstance(axes, dict):
        raise InputError(f"{document.locate(('matrix',))}: matrix is a mapping of keys to lists of values")
    problems = []
    for key, values in axes.items():
        at = document.locate(("matrix", key))
        if key.split(".")[0] in ("matrix", "extends", "kind"):
            problems.append(f"{at}: matrix cannot vary {key!r}")
        elif not isinstance(values, list) or not values:
            problems.append(f"{at}: matrix.{key} is a list with at least one value, such as [a, b]")
    if problems:
        raise InputError("\n".join(problems))
    axes = {key: values for key, values in axes.items() if tuple(key.split(".")) not in fixed}
    for choice in product(*(range(len(values)) for values in axes.values())):
        cell, made = {}, bare
        for (key, values), index in zip(axes.items(), choice, strict=True):
            cell[key] = values[index]
            where = document.locate(("matrix", key, index))
            made = assign(made, tuple(key.split(".")), values[index], where)
        yield cell, made


def plain(value: Any) -> Any:
    """The same data with ordinary texts, for writing out again."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


class _Builder:
    """Turns YAML nodes into plain data, collecting places and problems."""

    def __init__(self, source: str, base: Path, lines: bool = True) -> None:
        self.source, self.base, self.lines = source, base, lines
        self.where: dict[Place, Where] = {}
        self.problems: list[str] = []
        self._open: list[Node] = []
        self._scalars = YAML(typ="safe", pure=True).constructor

    def value(self, node: Node, place: Place) -> Any:
        if any(node is ancestor for ancestor in self._open):
            return self._problem(node, "an alias points to what contains it")
        self._open.append(node)
        try:
            if node.tag not in _SCALARS | _OTHERS:
                return self._problem(node, f"the tag {node.tag!r} means nothing in a recipe")
            if isinstance(node, MappingNode):
                return self._mapping(node, place)
            if isinstance(node, SequenceNode):
                return [self._item(item, (*place, index)) for index, item in enumerate(node.value)]
            if node.tag in _SCALARS:
                return self._scalars.construct_object(node)
            return SourceText(node.value, self.base)
        finally:
            self._open.pop()

    def _item(self, node: Node, place: Place) -> Any:
        self.where[place] = self._at(node)
        return self.value(node, place)

    def _mapping(self, node: MappingNode, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first: dict[str, Where] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key_node.tag == _TAGS + "merge":
                self._problem(key_node, "merge keys (<<) are not read; build on another recipe with extends")
                continue
            if isinstance(key_node, MappingNode | SequenceNode):
                self._problem(key_node, "a key is a text")
                continue
            if key in first:
                self._problem(key_node, f"duplicate key {key!r}, first given at {first[key]}")
                continue
            first[key] = self._at(key_node)
            self.where[(*place, key)] = first[key]
            found[key] = self.value(value_node, (*place, key))
        return found

    def _at(self, node: Node) -> Where:
        return Where(self.source, node.start_mark.line + 1 if self.lines else 0)

    def _problem(self, node: Node, message: str) -> None:
        self.problems.append(f"{self._at(node)}: {message}")


def _problem(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError):
        return str(error)
    return ", ".join(part for part in (error.context, error.problem) if part)


def _holds(data: Any, place: Place) -> bool:
    for part in place:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _merge_into(
    base: dict[str, Any],
    over: Mapping[str, Any],
    place: Place,
    where: dict[Place, Where],
    over_where: dict[Place, Where],
) -> None:
    for key, value in over.items():
        here = (*place, key)
        old = base.get(key)
        if isinstance(value, dict) and isinstance(old, str) and here in SHORTHAND:
            old = base[key] = {SHORTHAND[here]: old}
        if isinstance(value, dict) and isinstance(old, dict):
            where[here] = over_where[here]
            _merge_into(old, value, here, where, over_where)
            continue
        for known in [known for known in where if known[: len(here)] == here]:
            del where[known]
        base[key] = copy.deepcopy(value)
        where.update({known: at for known, at in over_where.items() if known[: len(here)] == here})
