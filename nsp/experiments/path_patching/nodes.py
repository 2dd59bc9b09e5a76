"""The ends of paths: senders and receivers on one model, their labels, and which reach which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nsp.datasets.prompts import Prompt
from nsp.engine.lowering import resolve
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot
from nsp.errors import InputError
from nsp.models.geometry import Geometry
from nsp.sites import Site


@dataclass(frozen=True)
class Node:
    """One end of a path.

    Attributes:
        layer: -1 for the embedding, the number of layers for the logits.
        unit: the head, or None for the component as a whole.
        rows: how many unit rows the component's tensor has, and ``unit_rows`` those of the node.
        place: where it stands in the forward pass; a sender reaches receivers of a larger place.
    """

    component: str
    layer: int
    unit: int | None
    rows: int
    unit_rows: tuple[int, ...]
    place: int

    @property
    def label(self) -> str:
        """Its selector: ``z[3][5]``, ``mlp_out[2]``, ``embed``, ``logits``."""
        if self.component in ("embed", "logits"):
            return self.component
        return f"{self.component}[{self.layer}]" + ("" if self.unit is None else f"[{self.unit}]")


def check_stream(geometry: Geometry) -> None:
    """Refuse models whose residual stream is not a sum: a path through it has no change of its own."""
    if geometry.table.stream:
        raise InputError(
            f"path patching needs a residual stream to which every component adds, and {geometry.table.name} has none: "
            f"{geometry.table.stream}"
        )


def senders_of(runtime: Runtime, selectors: Iterable[str]) -> tuple[Node, ...]:
    """The senders, in the order of the forward pass, each once."""
    return _nodes(runtime, selectors, receiving=False)


def receivers_of(runtime: Runtime, selectors: Iterable[str]) -> tuple[Node, ...]:
    """The receivers, in the order of the forward pass, each once."""
    return _nodes(runtime, selectors, receiving=True)


def _nodes(runtime: Runtime, selectors: Iterable[str], *, receiving: bool) -> tuple[Node, ...]:
    geometry = runtime.geometry
    found: dict[str, Node] = {}
    for text in selectors:
        site = Site.parse(text)
        item = resolve(runtime, site, [Prompt.from_ids([0])])
        for layer in item.layers:
            place = _place(geometry, site.component, layer, receiving)
            at = {"embed": -1, "logits": geometry.n_layers}.get(site.component, layer)
            for number, rows in enumerate(item.unit_rows):
                unit = None if item.units is None else item.units[number]
                node = Node(site.component, at, unit, item.rows, tuple(int(row) for row in rows), place)
                found[node.label] = node
    return tuple(sorted(found.values(), key=lambda node: (node.place, node.component, node.unit or 0)))


def _place(geometry: Geometry, component: str, layer: int, receiving: bool) -> int:
    """Senders of layer l stand at 3l + 1 (attention) and 3l + 2 (MLP); a receiver behind everything that it reads."""
    if component == "embed":
        return -1
    if component == "logits":
        return 3 * geometry.n_layers
    if not receiving:
        return 3 * layer + (2 if component == "mlp_out" else 1)
    # What reads the stream between attention and MLP sees the layer's own attention.
    return 3 * layer + (2 if component == "mlp_out" and has_middle(geometry) else 0)


def has_middle(geometry: Geometry) -> bool:
    """Whether the MLP reads the stream after attention; in parallel blocks it reads what attention reads."""
    return "resid_mid" in geometry.components()


def reaches(sender: Node, receiver: Node) -> bool:
    """Whether there is a direct path."""
    return sender.place < receiver.place


def input_slot(geometry: Geometry, receiver: Node) -> Slot:
    """Where what a receiver reads is kept: the residual stream into its layer, or between attention and MLP."""
    if receiver.component == "mlp_out" and has_middle(geometry):
        return ("resid_mid", receiver.layer)
    return (BOUNDARY, receiver.layer)


def grouped(receivers: Sequence[Node]) -> list[list[int]]:
    """Numbers of receivers that read the same state, group after group."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for number, node in enumerate(receivers):
        groups.setdefault((node.layer, node.component == "mlp_out"), []).append(number)
    return list(groups.values())
