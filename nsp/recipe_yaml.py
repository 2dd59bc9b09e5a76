"""YAML text as plain data that remembers where each key was written, and the few ways in which such data combine.

YAML 1.2 is read (``0:6`` and ``yes`` are texts). Duplicate keys, merge keys and tags are errors, never silently
resolved. Every text remembers the directory that it was written for (`SourceText`), so that a relative path in a recipe
is resolved against the file that holds it, whichever recipe extends that file.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from nsp.errors import InputError

Place = tuple[str | int, ...]
"""The keys and list indices that lead to a value."""
Items = Iterable[tuple[str, Any]]
_OPEN_SLICE = re.compile(r"-?\d*:(-?\d+)?(:-?\d*)?")

SHORTHAND: Mapping[Place, str] = {("model",): "name", ("metric",): "kind"}
"""Keys where a bare text stands for a mapping with this one key: ``model: gpt2`` is ``model: {name: gpt2}``."""

_TAGS = "tag:yaml.org,2002:"
_SCALARS = {_TAGS + name for name in ("null", "bool", "int", "float")}
_OTHERS = {_TAGS + name for name in ("str", "map", "seq", "timestamp")}  # a date is a text here


class SourceText(str):
    """A text that knows the directory against which it is resolved, should it turn out to be a relative path."""

    base: Path

    def __new__(cls, text: str, base: Path = Path()) -> SourceText:
        self = super().__new__(cls, text)
        self.base = base
        return self


@dataclass(frozen=True, order=True)
class Where:
    """Where something was written: a file and a line, or a command-line option."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


class SourceMapping(dict[str, Any]):
    """A mapping that knows where its keys were written, if they were."""

    def __init__(self, items: Mapping[str, Any] | Items = (), where: Mapping[str, Where] | Items = ()) -> None:
        super().__init__(items)
        self.where: dict[Any, Where] = dict(where)

    def without(self, key: str) -> SourceMapping:
        """The other keys."""
        return SourceMapping({name: value for name, value in self.items() if name != key}, self.where)


class SourceList(list[Any]):
    """A list that knows where its items were written."""

    def __init__(self, items: Iterable[Any], where: Iterable[Where]) -> None:
        super().__init__(items)
        self.where: dict[Any, Where] = dict(enumerate(where))


@dataclass(frozen=True)
class Document:
    """A mapping and what it was read from."""

    data: SourceMapping
    source: str

    def locate(self, place: Place) -> Where:
        """Where `place`, or the nearest thing around it, was written."""
        at = Where(self.source)
        value: Any = self.data
        for part in place:
            if not isinstance(value, SourceMapping | SourceList) or part not in value.where:
                break
            at, value = value.where[part], value[part]  # type: ignore[index]
        return at


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
    data = builder.value(node)
    if builder.problems:
        raise InputError("\n".join(builder.problems))
    return Document(data, source)


def read_setting(setting: str, option: str = "--set") -> tuple[tuple[str, ...], Any, Where]:
    """Read one ``key=value`` of the command line: the place that the dotted key names, the YAML value, the source."""
    where = Where(f"{option} {setting}")
    key, equals, text = setting.partition("=")
    place = tuple(key.strip().split("."))
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
    value = builder.value(node)
    if builder.problems:
        raise InputError("\n".join(builder.problems))
    return place, value, where


def merge(base: Document, over: Document) -> Document:
    """`over` on top of `base`: mappings merge key by key, anything else replaces.

    A key that `over` gives as one value ends an axis of the base's ``matrix`` over the same key.
    """
    data = base.data
    axes = data.get("matrix")
    if isinstance(axes, SourceMapping):
        varied = over.data.get("matrix")
        again = varied if isinstance(varied, dict) else {}
        kept = {key: values for key, values in axes.items() if key in again or not _holds(over.data, key.split("."))}
        data = SourceMapping({**data, "matrix": SourceMapping(kept, axes.where)}, data.where)
    return Document(_merged(data, over.data, ()), over.source)


def assign(document: Document, place: Sequence[str], value: Any, where: Where) -> Document:
    """`document` with `value` at `place`; mappings on the way are made, and a list is entered by index."""
    return Document(_assigned(document.data, (), place, value, where), document.source)


def matrix_cells(
    document: Document, fixed: frozenset[Place] = frozenset()
) -> Iterator[tuple[dict[str, Any], Document]]:
    """Every combination of the values listed under ``matrix``: the cell's values by key, and the document with them.

    Axes over a place in `fixed` are left out. Without a matrix there is one cell, with no values.
    """
    axes = document.data.get("matrix")
    bare = Document(document.data.without("matrix"), document.source)
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
        cell, filled = {}, bare
        for (key, values), index in zip(axes.items(), choice, strict=True):
            cell[key] = values[index]
            filled = assign(filled, key.split("."), values[index], document.locate(("matrix", key, index)))
        yield cell, filled


def plain(value: Any) -> Any:
    """The same data with ordinary texts, for writing out again."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


class _Builder:
    """Turns YAML nodes into plain data that knows its places, collecting problems."""

    def __init__(self, source: str, base: Path, lines: bool = True) -> None:
        self.source, self.base, self.lines = source, base, lines
        self.problems: list[str] = []
        self._open: list[Node] = []
        self._scalars = YAML(typ="safe", pure=True).constructor

    def value(self, node: Node) -> Any:
        if any(node is ancestor for ancestor in self._open):
            return self._problem(node, "an alias points to what contains it")
        self._open.append(node)
        try:
            if node.tag not in _SCALARS | _OTHERS:
                return self._problem(node, f"the tag {node.tag!r} means nothing in a recipe")
            if isinstance(node, MappingNode):
                return self._mapping(node)
            if isinstance(node, SequenceNode):
                return SourceList(map(self.value, node.value), map(self._at, node.value))
            if node.tag in _SCALARS:
                return self._scalars.construct_object(node)
            return SourceText(node.value, self.base)
        finally:
            self._open.pop()

    def _mapping(self, node: MappingNode) -> SourceMapping:
        mapping = SourceMapping()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key_node.tag == _TAGS + "merge":
                self._problem(key_node, "merge keys (<<) are not read; build on another recipe with extends")
            elif isinstance(key_node, MappingNode | SequenceNode):
                self._problem(key_node, "a key is a text")
            elif key in mapping:
                self._problem(key_node, f"duplicate key {key!r}, first given at {mapping.where[key]}")
            else:
                mapping.where[key] = self._at(key_node)
                mapping[key] = self.value(value_node)
        return mapping

    def _at(self, node: Node) -> Where:
        return Where(self.source, node.start_mark.line + 1 if self.lines else 0)

    def _problem(self, node: Node, message: str) -> None:
        self.problems.append(f"{self._at(node)}: {message}")


def _problem(error: YAMLError) -> str:
    if not isinstance(error, MarkedYAMLError):
        return str(error)
    return ", ".join(part for part in (error.context, error.problem) if part)


def _holds(data: Any, place: Sequence[str]) -> bool:
    for part in place:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _merged(base: SourceMapping, over: SourceMapping, place: Place) -> SourceMapping:
    merged = SourceMapping(base, {**base.where, **over.where})
    for key, value in over.items():
        old = _opened(base.get(key), (*place, key), base.where.get(key)) if isinstance(value, SourceMapping) else None
        merged[key] = _merged(old, value, (*place, key)) if isinstance(old, SourceMapping) else value
    return merged


def _opened(value: Any, place: Place, where: Where | None) -> Any:
    """A text that is short for a mapping as that mapping, anything else as it is."""
    if not isinstance(value, str) or place not in SHORTHAND:
        return value
    return SourceMapping({SHORTHAND[place]: value}, {} if where is None else {SHORTHAND[place]: where})


def _assigned(here: Any, done: Place, left: Sequence[str], value: Any, where: Where) -> Any:
    """``here``, which is at ``done``, with a value at what is ``left`` of the place."""
    part: str | int = left[0]
    if isinstance(here, SourceList):
        if not left[0].isdigit() or int(left[0]) >= len(here):
            path = ".".join(map(str, done))
            raise InputError(f"{where}: {path} has {len(here)} item(s), counted from 0; there is no {left[0]!r}")
        part = int(left[0])
    changed = copy.copy(here)
    changed.where = dict(here.where)
    if len(left) == 1:
        changed[part], changed.where[part] = value, where
        return changed
    place = (*done, part)
    inner = here[part] if isinstance(part, int) or part in here else None
    inner = _opened(inner, place, here.where.get(part))
    if not (isinstance(inner, SourceMapping) or (isinstance(inner, SourceList) and left[1].isdigit())):
        inner = SourceMapping()
    changed[part] = _assigned(inner, place, left[1:], value, where)
    changed.where.setdefault(part, where)
    return changed
