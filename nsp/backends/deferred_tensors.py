"""Tensors that lie on a server: operations on them are written down and run there when a number is asked for.

The engine lowers a request to programs that read one another's results (a branch reads its trunk's keys and values).
Against a server those results must stay where they are, so `Graph.run` hands out `Lazy` tensors: they know their
shape and dtype, an operation on them makes another `Lazy`, and ``.numpy()``, ``.item()`` and their like fetch. One
fetch is one job: all that the wanted numbers stand on, and the small outputs of every program that waits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nsp.backends.deferred_operations import FACTS, RECORDED
from nsp.engine.program import Outputs, Program
from nsp.errors import NspError

REF = "__ref__"
CACHE = "__cache__"
# Programs that are lowered for one job, where somebody waits for it.
TOGETHER = 12
# Outputs that are a few numbers a branch: they come back with every job that runs their program.
SMALL = ("norms", "metrics", "chosen")

Step = dict[str, Any]
Send = Callable[[list[Step], list[int], str], list[torch.Tensor]]
"""(steps, numbers of the wanted ones, attention implementation) -> their values, on the CPU."""


@dataclass(frozen=True)
class Shapes:
    """What the shapes of a program's outputs follow from."""

    dtype: torch.dtype
    d_model: int
    vocabulary: int  # logits a row
    n_kv_heads: int
    head_dim: int


@dataclass(eq=False)
class Node:
    """One value on the server: a step whose arguments may be other nodes."""

    step: Step
    attention: str = ""  # of a program's run; empty: of no importance
    small: list[weakref.ReferenceType[Lazy]] = field(default_factory=list)


class Lazy(torch.Tensor):
    """A tensor on the server, seen from here: shape, dtype and how it is made, and its value once it was fetched."""

    node: Node
    graph: Graph
    value: torch.Tensor | None

    @staticmethod
    def of(graph: Graph, node: Node, shape: Sequence[int], dtype: torch.dtype) -> Lazy:
        """The value of ``node``, which has that shape and dtype."""
        made: Any = torch.Tensor._make_wrapper_subclass(Lazy, tuple(shape), dtype=dtype)
        made.node, made.graph, made.value = node, graph, None
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.__setitem__ and isinstance(args[0], Lazy) and args[0].value is None:
            _set_item(args[0], args[1], args[2])
            return None
        waiting = [item for item in _lazies((args, kwargs)) if item.value is None]
        if waiting and func in RECORDED:
            return _record(waiting[0].graph, func, args, kwargs)
        fetched(waiting)
        return func(*_mapped(args, _value), **_mapped(kwargs, _value))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a plain function that switches it off
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached from inside torch's own code, past __torch_function__.
        fetched(_lazies((args, kwargs or {})))
        return func(*_mapped(args, _value), **_mapped(kwargs or {}, _value))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"Lazy(shape={tuple(self.shape)}, dtype={self.dtype}, fetched={self.value is not None})"


class Graph:
    """The values of one model on one server. ``send`` runs a job there."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self._waiting: list[Node] = []  # runs whose small outputs nobody has fetched yet

    def run(self, program: Program, model: Shapes, attention: str) -> Outputs:
        """Write one program down; its outputs are lazy, and a cache among its inputs holds lazy keys and values."""
        inputs = dict(program["inputs"])
        cache = inputs.get("past_key_values")
        if cache is not None:
            held = [(layer.keys, layer.values) for layer in cache.layers]
            inputs["past_key_values"] = {CACHE: [list(pair) for pair in held]}
        node = Node({"do": "run", "program": {**program, "inputs": inputs}}, attention)
        outputs = self._outputs(node, program, model)
        if cache is not None:
            self._fill(cache, node, program, model)
        small = [*outputs["norms"], *outputs["metrics"]]
        small += [] if outputs["chosen"] is None else [outputs["chosen"]]
        if small:
            node.small = [weakref.ref(one) for one in small if isinstance(one, Lazy)]
            self._waiting.append(node)
        return outputs

    def differentiate(
        self, program: Any, shapes: Sequence[tuple[int, ...]], model: Shapes, attention: str
    ) -> dict[str, Any]:
        """Write a gradient program down; ``shapes`` are those of its tracked tensors, by number.

        The outputs are lazy, as `nsp.engine.differentiate` returns them.
        """
        node = Node({"do": "differentiate", "program": program}, attention)

        def get(key: str, index: int | None, shape: Sequence[int], kind: torch.dtype) -> Lazy:
            return Lazy.of(self, Node({"do": "get", "run": node, "key": key, "index": index}), shape, kind)

        readout, edges = program["readout"], program["edges"]
        count = len(readout["batch"])
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        width = model.vocabulary if readout["vocabulary"] is None else len(readout["vocabulary"])
        reached = [] if edges is None else [one["rows"] for one in edges["receivers"]]
        receivers = sum(1 if rows is None else len(rows) for rows in reached)
        return {
            "values": [get("values", number, shape, model.dtype) for number, shape in enumerate(shapes)],
            "gradients": [get("gradients", number, shape, model.dtype) for number, shape in enumerate(shapes)],
            "metric": get("metric", None, (count,), wide),
            "logits": get("logits", None, (count, width), wide) if readout["logits"] else None,
            "edges": None if edges is None else get("edges", None, (edges["senders"], receivers), torch.float64),
        }

    def weight(self, path: str, like: torch.Tensor) -> Lazy:
        """The parameter or buffer at ``path`` of the model, shaped as ``like``."""
        return Lazy.of(self, Node({"do": "weight", "path": path}), like.shape, like.dtype)

    def fetch(self, values: Sequence[Any]) -> None:
        """Bring the values of lazy tensors here, in one job."""
        wanted = [one for one in values if isinstance(one, Lazy) and one.value is None and one.graph is self]
        if not wanted:
            return
        # Programs of a request that failed are not waited for any more: nobody holds their outputs.
        waiting, self._waiting = self._waiting, []
        alive = [one for node in waiting for one in (ref() for ref in node.small) if one is not None]
        asked = list(dict.fromkeys([*wanted, *(one for one in alive if one.value is None)]))
        # What another model's runs gave comes here first: a job has one model.
        others = _foreign([value.node for value in asked], self)
        for graph in dict.fromkeys(other.graph for other in others):
            graph.fetch(others)
        steps, number, attention = _job([value.node for value in asked])
        found = self.send(steps, [number[id(value.node)] for value in asked], attention)
        for value, tensor in zip(asked, found, strict=True):
            with torch._C.DisableTorchFunctionSubclass():
                shape, dtype = tuple(value.shape), value.dtype
            if tuple(tensor.shape) != shape:
                raise NspError(
                    f"the server returned a tensor of shape {tuple(tensor.shape)} where {shape} was due; its model is "
                    "not the one whose configuration was read here"
                )
            value.value = tensor.to(dtype)

    def _outputs(self, node: Node, program: Program, model: Shapes) -> Outputs:
        """Lazy outputs in the order of the program's steps, as `nsp.engine.execute` returns them."""

        def get(key: str, index: int | None, shape: Sequence[int], kind: torch.dtype) -> Lazy:
            return Lazy.of(self, Node({"do": "get", "run": node, "key": key, "index": index}), shape, kind)

        norms: list[torch.Tensor] = []
        reads: list[torch.Tensor] = []
        columns = int(program["inputs"]["input_ids"].shape[1])

        def norm(step: Any) -> None:
            norms.append(get("norms", len(norms), (len(step["batch"]),), torch.float32))

        def read(step: Any, *shape: int) -> None:
            size = shape if step["batch"] is None else (len(step["batch"]), shape[-1])
            reads.append(get("reads", len(reads), size, model.dtype))

        for entry in [*program["layers"], program["final"]]:
            for step in entry["writes"]:
                norm(step)
            for step in entry["reads"]:
                read(step, entry["rows"], columns, model.d_model)
            for visit in entry["visits"]:
                for step in visit["writes"]:
                    norm(step)
                keys = (columns,) if visit["side"] == "pattern" else ()
                for step in visit["reads"]:
                    shape = (visit["width"], columns) if keys else (columns, visit["width"])
                    read(step, entry["rows"], *shape, *keys)
        readout = program["readout"]
        metrics: list[torch.Tensor] = []
        logits = chosen = None
        if readout is not None:
            count = len(readout["batch"])
            metrics = [
                get("metrics", n, (count if step["select"] is None else len(step["select"]),), torch.float32)
                for n, step in enumerate(readout["metrics"])
            ]
            if readout["logits"]:
                width = model.vocabulary if readout["vocabulary"] is None else len(readout["vocabulary"])
                logits = get("logits", None, (count, width), torch.float32)
            if readout["choice"] is not None:
                chosen = get("chosen", None, (count,), torch.int64)
        return {"norms": norms, "reads": reads, "metrics": metrics, "logits": logits, "chosen": chosen}

    def _fill(self, cache: DynamicCache, node: Node, program: Program, model: Shapes) -> None:
        """Give the caller's cache the keys and values that it will hold once the program has run there."""
        columns = program["inputs"]["input_ids"].shape[1]
        for entry in program["layers"]:
            layer = entry["layer"]
            while len(cache.layers) <= layer:
                cache.layers.append(DynamicLayer())
            target: Any = cache.layers[layer]
            past = 0 if target.keys is None else target.keys.shape[2]
            past += 0 if entry["keys"] is None else entry["keys"].shape[2]
            shape = (entry["rows"], model.n_kv_heads, past + columns, model.head_dim)
            pair = [
                Lazy.of(self, Node({"do": "get", "run": node, "key": key, "index": layer}), shape, model.dtype)
                for key in ("keys", "values")
            ]
            target.dtype, target.device, target.is_initialized = model.dtype, torch.device("cpu"), True
            target.keys, target.values = pair


def fetched(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors with their values here: lazy ones are fetched in one job, others are returned as they are."""
    waiting = [value for value in values if isinstance(value, Lazy) and value.value is None]
    for graph in dict.fromkeys(value.graph for value in waiting):
        graph.fetch(waiting)
    return [_value(value) for value in values]


def _foreign(nodes: Sequence[Node], graph: Graph) -> list[Lazy]:
    """The values of other graphs that ``nodes`` stand on and that are not here yet."""
    found: dict[Lazy, None] = {}
    seen: set[int] = set()
    stack: list[Any] = list(nodes)
    while stack:
        item = stack.pop()
        if isinstance(item, Node):
            if id(item) not in seen:
                seen.add(id(item))
                stack.append(item.step)
        elif isinstance(item, Lazy):
            if item.value is None and item.graph is not graph:
                found[item] = None
            elif item.value is None:
                stack.append(item.node)
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list | tuple):
            stack += item
    return list(found)


def _job(wanted: Sequence[Node]) -> tuple[list[Step], dict[int, int], str]:
    """The steps that ``wanted`` stand on, in an order that works, each node's number, and the attention they run with."""
    steps: list[Step] = []
    number: dict[int, int] = {}
    attention: dict[str, None] = {}

    def encode(item: Any) -> Any:
        if isinstance(item, Node):
            return {REF: number[id(item)]}
        if isinstance(item, Lazy):
            return _wire(item.value) if item.value is not None else {REF: number[id(item.node)]}
        if isinstance(item, torch.Tensor):
            return _wire(item)
        return item

    stack: list[tuple[Node, bool]] = [(node, False) for node in reversed(wanted)]
    while stack:
        node, ready = stack.pop()
        if id(node) in number:
            continue
        if not ready:
            stack.append((node, True))
            stack += [(parent, False) for parent in _parents(node.step)]
            continue
        number[id(node)] = len(steps)
        if node.attention:
            attention[node.attention] = None
        # Its own number stands in no step of a node's, so it may be known before the step is encoded.
        steps.append(_mapped(node.step, encode))
    if len(attention) > 1:
        raise NspError(f"one job cannot run with several attention implementations ({', '.join(attention)})")
    return steps, number, next(iter(attention), "")


def _parents(item: Any) -> list[Node]:
    if isinstance(item, Node):
        return [item]
    if isinstance(item, Lazy):
        return [] if item.value is not None else [item.node]
    if isinstance(item, dict):
        return [node for part in item.values() for node in _parents(part)]
    if isinstance(item, list | tuple):
        return [node for part in item for node in _parents(part)]
    return []


def _wire(tensor: torch.Tensor) -> torch.Tensor:
    # A view would travel with everything that it is a view of.
    tensor = tensor.detach().cpu()
    held = tensor.untyped_storage().nbytes()
    return (
        tensor
        if held <= tensor.numel() * tensor.element_size()
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _mapped(item: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(item, dict):
        return {key: _mapped(part, change) for key, part in item.items()}
    if isinstance(item, list):
        return [_mapped(part, change) for part in item]
    if isinstance(item, tuple):
        return tuple(_mapped(part, change) for part in item)
    return change(item)


def _lazies(item: Any) -> list[Lazy]:
    if isinstance(item, Lazy):
        return [item]
    if isinstance(item, dict):
        return [one for part in item.values() for one in _lazies(part)]
    if isinstance(item, list | tuple):
        return [one for part in item for one in _lazies(part)]
    return []


def _value(item: Any) -> Any:
    return item.value if isinstance(item, Lazy) and item.value is not None else item


def _outline(item: Any) -> Any:
    """A tensor without its numbers, for working out shapes."""
    if isinstance(item, Lazy):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.empty(tuple(item.shape), dtype=item.dtype, device="meta")
    return item.to("meta") if isinstance(item, torch.Tensor) else item


def _plain_index(index: Any) -> Any:
    """An index without masks: on a server, and for shapes, their numbers are wanted."""
    if isinstance(index, torch.Tensor) and not isinstance(index, Lazy) and index.dtype == torch.bool:
        found = index.nonzero(as_tuple=True)
        return found if len(found) > 1 else found[0]
    if isinstance(index, tuple):
        return tuple(_plain_index(part) for part in index)
    return index


def _record(graph: Graph, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = RECORDED[func]
    if name in ("Tensor.to", "Tensor.cpu"):
        # Where a tensor lies on the server is the server's affair; only its dtype is ours.
        kinds = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, torch.dtype)]
        like = [one.dtype for one in args[1:] if isinstance(one, torch.Tensor)]
        kinds = kinds or like
        if not kinds:
            return args[0]
        args, kwargs = (args[0], kinds[0]), {}
    if name == "Tensor.__getitem__":
        args = (args[0], _plain_index(args[1]))
    made = func(*_mapped(args, _outline), **_mapped(kwargs, _outline))
    node = Node({"do": "call", "name": name, "args": list(args), "kwargs": kwargs})
    if isinstance(made, torch.Tensor):
        return Lazy.of(graph, node, made.shape, made.dtype)
    return type(made)(
        Lazy.of(graph, Node({"do": "item", "of": node, "index": at}), one.shape, one.dtype)
        for at, one in enumerate(made)
    )


def _set_item(target: Lazy, index: Any, value: Any) -> None:
    """``target[index] = value``: the name stands for the changed tensor from now on."""
    target.node = Node({"do": "set", "of": target.node, "index": _plain_index(index), "value": value})
