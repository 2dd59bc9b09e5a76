"""Where in a model something is read or written: `Site`, and the selector grammar that writes one.

A selector is ``component[layers][units] @ positions``, and it prints back. Each part takes ``*``, an index, a list
``1,4``, a slice ``2:8``, negatives counted from the end; positions also take the name of a span, of which ``last`` is
always known::

    resid_post[10] @ 9        mlp_neurons[12][501,733] @ -1        attn_out[*]        logits @ last
    z[2:8][3] @ subject,-1    module:model.layers.3.mlp.gate_proj[5] @ last

Parsing needs no model: indices are checked against a model or a prompt by `Selection.resolve`, where a slice is clipped
to the range as in Python, and an index out of range, or a part that selects nothing, is an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Literal, NoReturn, TypeAlias

from nsp.errors import InputError, suggestion
from nsp.html import card

Unit = Literal["head", "neuron"]
MODULE_PREFIX = "module:"
LAST = "last"

_SPACE = re.compile(r"\s*")
_COMPONENT = re.compile(r"[^\s\[\]@]+")
_MODULE_PATH = re.compile(r"[\w-]+(?:\.[\w-]+)*")
_INTEGER = re.compile(r"-?[0-9]{1,18}(?![\w.])")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Component:
    """One kind of activation, and every fact about it that nsp knows without a model.

    Attributes:
        unit: what it is divided into, heads or neurons; None for a stream. Columns of a submodule count as neurons.
        layered: whether every layer has one.
        place: its place in the order in which a layer makes its components; None for what lies between layers.
        boundary: for the residual stream between layers, how many layers further on it is kept than its layer's input.
        stream: whether it is the residual stream itself: at all positions it holds everything that follows.
        adds: whether it is added to the residual stream as it is.
        sends, receives: whether it is an end of a path: it writes to the stream through nothing but a linear map, or
            reads the stream through a norm.
        inside_mlp: whether it is lost where the MLP is left out.
        reaches_later: whether a write can reach later positions within the same layer.
        key_value: whether there is one a key/value head (of which grouped attention has fewer).
    """

    name: str
    unit: Unit | None
    layered: bool
    meaning: str
    place: int | None = None
    boundary: int | None = None
    stream: bool = False
    adds: bool = False
    sends: bool = False
    receives: bool = False
    inside_mlp: bool = False
    reaches_later: bool = False
    key_value: bool = False

    @property
    def is_module(self) -> bool:
        """Whether it is a submodule's output, named by its path."""
        return self.name.startswith(MODULE_PREFIX)

    @property
    def has_heads(self) -> bool:
        return self.unit == "head"

    @property
    def dim(self) -> str:
        """The dim that its units (or, where it has none, its columns) lie along."""
        return self.unit or "neuron"

    @property
    def sweep_axes(self) -> tuple[str, ...]:
        """The axes along which its sites are swept one by one, units apart from these."""
        return ("layer", "position") if self.layered else ("position",)


COMPONENTS: dict[str, Component] = {
    component.name: component
    for component in (
        Component("resid_pre", None, True, "residual stream that a layer receives", boundary=0, stream=True),
        Component(
            "resid_mid", None, True, "residual stream between a layer's attention and its MLP", 6, stream=True, inside_mlp=True
        ),
        Component("resid_post", None, True, "residual stream that a layer hands on", boundary=1, stream=True),
        Component("attn_out", None, True, "what attention adds to the residual stream", 5, adds=True, sends=True),
        Component(
            "mlp_out", None, True, "what the MLP adds to the residual stream", 10,
            adds=True, sends=True, receives=True, inside_mlp=True,
        ),
        Component("q", "head", True, "queries, before rotary embedding", 0, receives=True),
        Component("k", "head", True, "keys, before rotary embedding", 1, receives=True, reaches_later=True, key_value=True),
        Component("v", "head", True, "values", 2, receives=True, reaches_later=True, key_value=True),
        Component("z", "head", True, "per-head attention output before the output projection", 4, sends=True),
        Component("pattern", "head", True, "attention probabilities of each query position", 3),
        Component("mlp_gate", "neuron", True, "gate projection of the MLP, before the activation function", 7, inside_mlp=True),
        Component("mlp_up", "neuron", True, "up projection of the MLP", 8, inside_mlp=True),
        Component("mlp_neurons", "neuron", True, "input of the MLP's down projection", 9, inside_mlp=True),
        Component("logits", None, False, "next-token logits", receives=True),
        Component("embed", None, False, "residual stream before the first layer", boundary=0, sends=True),
    )
}  # fmt: skip
IN_LAYER: tuple[str, ...] = tuple(
    sorted((name for name, known in COMPONENTS.items() if known.place is not None), key=lambda name: COMPONENTS[name].place or 0)
)
"""The components inside a layer, in the order in which it makes them."""


def component(name: str) -> Component:
    """The component of a name; ``module:<path>`` is any submodule's output, its columns counted as neurons.

    Raises InputError with the nearest valid spelling where there is no such component.
    """
    known = COMPONENTS.get(name)
    return _submodule(name) if known is None else known


@functools.cache
def _submodule(name: str) -> Component:
    if name.startswith(MODULE_PREFIX):
        if _MODULE_PATH.fullmatch(name, len(MODULE_PREFIX)):
            meaning = f"output of the submodule {name.removeprefix(MODULE_PREFIX)}"
            return Component(name, "neuron", False, meaning, inside_mlp=True, reaches_later=True)
        raise InputError(f"{name!r} names no submodule; write a path such as module:model.layers.3.mlp.gate_proj")
    raise InputError(f"unknown component {name!r}{suggestion(name, COMPONENTS)} (nsp has {', '.join(COMPONENTS)} and module:<path>)")


@dataclass(frozen=True)
class Slice:
    """``start:stop:step`` as in Python; an absent bound is None, a step of 1 is written as None."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if self.step == 0:
            raise InputError(f"slice {self}: the step cannot be 0")
        if self.step == 1:
            object.__setattr__(self, "step", None)

    def indices(self, size: int) -> range:
        """The indices below ``size`` that the slice selects."""
        return range(size)[self.start : self.stop : self.step]

    def __str__(self) -> str:
        bounds = [self.start, self.stop] if self.step is None else [self.start, self.stop, self.step]
        return ":".join("" if bound is None else str(bound) for bound in bounds)


Item: TypeAlias = int | Slice | str


@dataclass(frozen=True)
class Selection:
    """What stands inside one bracket or after ``@``: indices, slices and span names in order, or everything (``*``)."""

    items: tuple[Item, ...] = ()
    everything: bool = False

    def __post_init__(self) -> None:
        if self.everything == bool(self.items):
            raise InputError("a selection is either everything or a list of at least one index, slice or span name")
        for item in self.items:
            if isinstance(item, str) and not _NAME.fullmatch(item):
                raise InputError(f"span name {item!r}: a name starts with a letter and holds letters, digits, _ and -")

    @classmethod
    def of(cls, value: SelectionLike) -> Selection:
        """A selection from its text, an index, a Python slice, or a list of these; ``"all"`` is ``*``."""
        if isinstance(value, Selection):
            return value
        if isinstance(value, str):
            return _selection(value)
        if isinstance(value, Iterable):
            parts = [cls.of(part) for part in value]
            if len(parts) > 1 and any(part.everything for part in parts):
                raise InputError(f"{value!r}: '*' stands alone")
            return parts[0] if len(parts) == 1 else cls(tuple(item for part in parts for item in part.items))
        if isinstance(value, slice):
            return cls((Slice(value.start, value.stop, value.step),))
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise InputError(f"cannot select by {value!r}; give '*', an index, a list '1,4' or a slice '2:8'")
        return cls((value.__index__(),))

    @property
    def names(self) -> tuple[str, ...]:
        """The span names among the items."""
        return tuple(item for item in self.items if isinstance(item, str))

    def resolve(
        self, size: int, *, what: str | Callable[[], str], names: Mapping[str, tuple[int, ...]] | None = None
    ) -> tuple[int, ...]:
        """The indices selected of ``size``, in the order written, each once.

        ``what`` names the axis in errors ("layer of resid_post[40]"), or is what makes that name; ``names`` are the spans that names stand for, or
        None where the axis has none. Raises InputError for an index out of range, an unknown name or an item that
        selects nothing.
        """
        if size < 1:
            raise InputError(f"{_named(what)}: there are none to select")
        if self.everything:
            return tuple(range(size))
        return tuple(dict.fromkeys([index for item in self.items for index in _indices(item, size, what, names)]))

    def __str__(self) -> str:
        return "*" if self.everything else ",".join(map(str, self.items))


SelectionLike: TypeAlias = Selection | str | int | slice | Iterable[int | str | slice]
_ALL = Selection(everything=True)


def _named(what: str | Callable[[], str]) -> str:
    return what if isinstance(what, str) else what()


@functools.lru_cache(maxsize=4096)
def _selection(text: str) -> Selection:
    return _ALL if text.strip() == "all" else _Reader(text).whole_selection()


def _indices(item: Item, size: int, what: str | Callable[[], str], names: Mapping[str, tuple[int, ...]] | None) -> Iterable[int]:
    if isinstance(item, int) and -size <= item < size:
        return (item % size,)
    if isinstance(item, str) and names is not None and item in names:
        return names[item]
    if isinstance(item, Slice) and (chosen := item.indices(size)):
        return chosen
    what, valid = _named(what), "only 0 (or -1)" if size == 1 else f"0 to {size - 1} (or -{size} to -1)"
    if isinstance(item, str):
        if names is None:
            raise InputError(f"{what}: {item!r} is a name; only positions have names, here valid is {valid}")
        known = ", ".join(names)
        raise InputError(f"{what}: there is no span {item!r}; known are {known}; indices run over {valid}")
    problem = "selects nothing" if isinstance(item, Slice) else "is out of range"
    raise InputError(f"{what}: {item} {problem}; valid is {valid}")


@dataclass(frozen=True)
class Site:
    """A component at layers, positions and units; a part that was not written is None.

    Attributes:
        component: a key of `COMPONENTS`, or ``module:<path>``.
        layers: layer numbers; None for components without layers.
        units: head or neuron numbers; None means the component as a whole, ``*`` each unit apart.
        positions: token positions, by index, slice or span name.
    """

    component: str
    layers: Selection | None = None
    units: Selection | None = None
    positions: Selection | None = None

    def __post_init__(self) -> None:
        known = component(self.component)
        if self.layers is not None and not known.layered:
            raise InputError(f"{self.component} has no layers; write {_shape(known)}")
        if self.units is not None and known.unit is None:
            raise InputError(f"{self.component} has no heads or neurons; write {_shape(known)}")
        if self.units is not None and known.layered and self.layers is None:
            object.__setattr__(self, "layers", _ALL)
        for part in (self.layers, self.units):
            if part is not None and part.names:
                raise InputError(f"{self}: {part.names[0]!r} is a name; only positions, after '@', have names")

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that a selector writes; raises InputError that points at the column where the text goes wrong."""
        if not isinstance(text, str):
            raise InputError(f"a selector is text such as 'resid_post[10] @ 9', not {type(text).__name__}")
        return _site(text)

    @classmethod
    def of(
        cls,
        name: str,
        layers: SelectionLike | None = None,
        units: SelectionLike | None = None,
        positions: SelectionLike | None = None,
    ) -> Site:
        """The site of a component at layers, units and positions, each as text, an index, a list, a slice or None.

        ``"all"`` is everything.
        """
        return cls(name, *(None if part is None else Selection.of(part) for part in (layers, units, positions)))

    @property
    def spec(self) -> Component:
        """What is known about the site's component."""
        return component(self.component)

    def with_(
        self,
        *,
        layers: SelectionLike | EllipsisType | None = ...,
        units: SelectionLike | EllipsisType | None = ...,
        positions: SelectionLike | EllipsisType | None = ...,
    ) -> Site:
        """The site with some parts changed; None removes a part."""
        return replace(
            self,
            layers=_changed(self.layers, layers),
            units=_changed(self.units, units),
            positions=_changed(self.positions, positions),
        )

    def __str__(self) -> str:
        layers = "" if self.layers is None else f"[{self.layers}]"
        units = "" if self.units is None else f"[{self.units}]"
        return f"{self.component}{layers}{units}" + ("" if self.positions is None else f" @ {self.positions}")

    def _repr_html_(self) -> str:
        known = self.spec
        facts = [("component", f"{known.name}: {known.meaning}")]
        if known.layered:
            facts.append(("layers", _in_words(self.layers, "every layer")))
        if known.unit:
            facts.append((f"{known.unit}s", _in_words(self.units, f"each {known.unit} apart", f"all {known.unit}s as a whole")))
        facts.append(("positions", _in_words(self.positions, "every position")))
        return card("Site", str(self), facts=facts)


@functools.lru_cache(maxsize=4096)
def _site(text: str) -> Site:
    return _Reader(text).site()


def _changed(old: Selection | None, new: SelectionLike | EllipsisType | None) -> Selection | None:
    if isinstance(new, EllipsisType):
        return old
    return None if new is None else Selection.of(new)


def _in_words(part: Selection | None, everything: str, absent: str | None = None) -> str:
    if part is None:
        return absent or everything
    return everything if part.everything else str(part)


def _shape(known: Component) -> str:
    layers = "[layers]" if known.layered else ""
    units = f"[{known.unit}s]" if known.unit else ""
    return f"{known.name}{layers}{units} @ positions"


class _Reader:
    """A reader of one selector, from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def site(self) -> Site:
        name = self.take(_COMPONENT)
        start = self.at - len(name or "")
        if name is None:
            self.fail("expected a component, for example resid_post[10] @ 9")
        try:
            known = component(name)
        except InputError as error:
            self.fail(str(error), start)
        layers = self.bracket() if known.layered else None
        units = self.bracket() if known.unit and (layers or not known.layered) else None
        if self.take_mark("["):
            self.fail(f"one bracket too many: write {_shape(known)}", self.at - 1)
        positions = self.selection(spans=True) if self.take_mark("@") else None
        self.end("',' or the end" if positions else "'[', '@' or the end")
        return Site(name, layers, units, positions)

    def bracket(self) -> Selection | None:
        if not self.take_mark("["):
            return None
        found = self.selection(spans=False)
        if not self.take_mark("]"):
            self.fail("expected ',' or ']'")
        return found

    def whole_selection(self) -> Selection:
        found = self.selection(spans=True)
        self.end("',' or the end")
        return found

    def selection(self, *, spans: bool) -> Selection:
        start = self.skip_space()
        if self.take_mark("*"):
            if self.take_mark(","):
                self.fail("'*' is everything, so it stands alone", start)
            return _ALL
        return Selection(tuple(self.items(spans)))

    def items(self, spans: bool) -> Iterator[Item]:
        yield self.item(spans)
        while self.take_mark(","):
            yield self.item(spans)

    def item(self, spans: bool) -> Item:
        start = self.skip_space()
        name = self.take(_NAME)
        if name is not None:
            if not spans:
                self.fail(f"{name!r} is a name; only positions, after '@', have names (the last layer is -1)", start)
            return name
        index = self.integer()
        bounds: list[int | None] = []
        while len(bounds) < 2 and self.take_mark(":"):
            bounds.append(self.integer())
        if bounds:
            if bounds[1:] == [0]:
                self.fail("the step of a slice cannot be 0", start)
            return Slice(index, *bounds)
        if index is None:
            star = self.text.startswith("*", start)
            other = "the name of a span" if spans else "'*' alone"
            wanted = f"expected an index, a slice such as 2:8, or {other}"
            self.fail("'*' is everything, so it stands alone" if star else wanted, start)
        return index

    def integer(self) -> int | None:
        found = self.take(_INTEGER)
        return None if found is None else int(found)

    def take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.text, self.skip_space())
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def take_mark(self, mark: str) -> bool:
        taken = self.text.startswith(mark, self.skip_space())
        self.at += taken
        return taken

    def skip_space(self) -> int:
        found = _SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return self.at

    def end(self, expected: str) -> None:
        if self.skip_space() < len(self.text):
            self.fail(f"expected {expected}")

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        at = self.skip_space() if at is None else at
        shown = "".join(char if char.isprintable() else "?" for char in self.text)
        raise InputError(f"selector, column {at + 1}: {problem}\n    {shown}\n    {' ' * at}^") from None
