"""One forward pass, lowered to plain data: what enters, what is written and read where, what is projected at the end.

A `Program` is dictionaries, lists, strings, numbers and tensors only, so that the same program runs in a local trace
and on a remote server. The branch path and the plain path differ only in how they fill it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

import torch


class Step(TypedDict, total=False):
    """One group of writes or one read at a tensor with axes (row, column, width)."""

    kind: str  # set | add | scale | project | blend | apply (writes), read
    batch: torch.Tensor | None  # (write,) row of each write; None on a read: the whole tensor
    column: torch.Tensor | None
    unit: torch.Tensor
    rows: int  # how many unit rows the last axis is split into
    operand: torch.Tensor  # (write, unit width), broadcastable
    taken: tuple[torch.Tensor, torch.Tensor]  # instead of an operand: row and column of this tensor, (write,) each
    keep: torch.Tensor  # blend only: (write, unit width), where the value stays
    function: Callable[[torch.Tensor], torch.Tensor]
    groups: list[torch.Tensor]  # apply only: the writes of one branch and unit, called together
    name: str  # apply only: the site, for messages
    keys: torch.Tensor  # pattern only: (write, key position) -> key column


class Visit(TypedDict):
    """One stop inside a layer: the tensor at a module's input or output, or the attention pattern."""

    module: str
    side: str  # input | output | call | experts | pattern
    index: int | str | None  # element of a tuple output; for call and pattern the call's name, a/b: call b inside a
    reused: bool  # later code adds to this very tensor in place: reads copy it
    multiplier: float  # what the tensor is multiplied by before it is added to the residual stream
    width: int  # of a read, where it must be known before the program has run (see Runtime.read_width)
    writes: list[Step]
    reads: list[Step]
    bypass: str  # "leaves" at a written resid_mid, "arrives" at that layer's mlp_out, else empty


class LayerEntry(TypedDict):
    """What happens at and inside one layer; ``rows`` rows of the batch are active in it."""

    path: str
    layer: int
    rows: int
    join: torch.Tensor | None  # (new row, column, width): rows that start at this layer
    copied: NotRequired[tuple[torch.Tensor, torch.Tensor]]  # instead: row and column of what the layer receives
    keys: torch.Tensor | None  # (row, head, past position, width): the trunk's keys and values
    values: torch.Tensor | None
    writes: list[Step]  # on what the layer receives
    reads: list[Step]
    visits: list[Visit]
    trim: Trim | None


class Trim(TypedDict):
    """The only tokens whose MLP output still matters in a last layer."""

    module: str
    batch: torch.Tensor
    column: torch.Tensor


class MetricStep(TypedDict):
    kind: str | Callable[[torch.Tensor], torch.Tensor]  # a metric's name, or a function of the logits
    tokens: torch.Tensor | None  # (readout, 1 or 2), columns of what is projected
    reference: torch.Tensor | None  # (reference run, token) float32 logits
    reference_row: torch.Tensor | None  # (readout,)
    select: torch.Tensor | None  # (measured,) the readouts this metric is taken at; None: all


class Choice(TypedDict):
    """How a next token is chosen from logits; ``uniform`` holds one number in [0, 1) a readout."""

    temperature: float  # 0: the most likely token
    top_k: int | None
    top_p: float | None
    uniform: torch.Tensor


class Readout(TypedDict):
    """Which (row, column) are projected to logits, onto which vocabulary entries, and what is computed from them."""

    norm: str
    head: str
    batch: torch.Tensor  # (readout,)
    column: torch.Tensor
    vocabulary: torch.Tensor | None  # entries to project on; None: all
    metrics: list[MetricStep]
    logits: bool  # return the logits themselves
    choice: Choice | None  # return a chosen token a readout
    chunk: int  # readouts projected at a time where the whole vocabulary is needed
    softcap: float | None
    logit_scale: float


class Program(TypedDict):
    inputs: dict[str, Any]
    batch: int  # rows in the whole batch
    start: int  # layers below are skipped
    skipped: list[str]
    first: torch.Tensor | None  # what the skipped layers hand on
    layers: list[LayerEntry]
    final: LayerEntry  # the boundary after the last layer (path: the final norm)
    readout: Readout | None
    head: NotRequired[str]  # the head's path, which need not run itself


class Outputs(TypedDict):
    """What a program hands back, in the order in which its steps stand in the program."""

    norms: list[torch.Tensor]  # (write,) L2 norm of the change, one a write step
    reads: list[torch.Tensor]
    metrics: list[torch.Tensor]  # (measured,) float32
    logits: torch.Tensor | None  # (readout, token) float32
    chosen: torch.Tensor | None  # (readout,) token ids
