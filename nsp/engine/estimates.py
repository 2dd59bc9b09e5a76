"""What a request will cost before it runs: passes, branches, tokens, layers, time and memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from nsp.engine.branches import Bases, Branches
from nsp.engine.budget import Budget, pass_bytes, plain_token_bytes
from nsp.engine.measuring import pass_plan
from nsp.engine.pack import Pass
from nsp.engine.runtime import Runtime


@dataclass(frozen=True)
class Estimate:
    """The cost of one request.

    Attributes:
        title: what is swept.
        path, reason: which path will run, and why.
        branches: counterfactuals that run; ``pruned`` those whose effect is exactly zero.
        passes: forward passes; ``tokens`` their columns; ``token_layers`` columns times layers run.
        naive_token_layers: what one full forward pass a counterfactual would take.
        work: floating-point operations of the branches' changed tokens, whatever they are packed into; depends on nothing but the
            request and the model.
        flop: floating-point operations with padding and copies; ``seconds`` at the speed measured on this machine; ``bytes`` peak memory
            beside the model.
    """

    title: str
    path: str
    reason: str
    branches: int
    pruned: int
    passes: int
    tokens: int
    token_layers: int
    naive_token_layers: int
    work: float
    flop: float
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Schedule:
    """The estimates of all requests of a plan, in the order in which they run."""

    estimates: tuple[Estimate, ...]

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.estimates)

    @property
    def bytes(self) -> int:
        return max((one.bytes for one in self.estimates), default=0)

    def rows(self) -> list[list[str]]:
        """One row of text a request."""
        return [
            [
                one.title,
                one.path,
                f"{one.branches:,}",
                f"{one.pruned:,}",
                f"{one.passes:,}",
                f"{one.tokens:,}",
                f"{100 * one.token_layers / max(1, one.naive_token_layers):.1f} %",
                f"{one.seconds:.1f} s",
                f"{one.bytes / 1e6:.0f} MB",
            ]
            for one in self.estimates
        ]

    COLUMNS = ("sweep", "path", "branches", "pruned", "passes", "tokens", "of naive cost", "time", "memory")

    def lines(self) -> list[str]:
        """The table as plain text lines."""
        return ["  ".join(self.COLUMNS), *("  ".join(row) for row in self.rows())]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table()
        for number, column in enumerate(self.COLUMNS):
            table.add_column(column, justify="left" if number < 2 else "right")
        for row in self.rows():
            table.add_row(*row)
        yield table
        yield Text(f"about {self.seconds:.1f} s and {self.bytes / 1e6:.0f} MB beside the model")
        for one in self.estimates:
            if one.path == "plain":
                yield Text(f"{one.title}: plain path, since {one.reason}")


def estimate(
    runtime: Runtime, branches: Branches, budget: Budget, title: str = "", *, together: int | None = None
) -> Estimate:
    """The cost of branches and of their bases' runs: no forward pass runs.

    ``together``: how many bases run at a time, whose activations are kept; by default all.
    """
    bases, n_layers, cost = branches.bases, runtime.geometry.n_layers, runtime.cost
    passes = pass_plan(runtime, branches, budget)
    naive = int(bases.lengths[branches.base].sum()) * n_layers
    work = float((branches.lengths * (n_layers - branches.join)).sum()) * cost.per_token
    tokens = token_layers = 0
    flop, peak = 0.0, 0.0
    for chosen in passes:
        if isinstance(chosen, Pass):
            tokens += chosen.tokens
            token_layers += chosen.token_layers(n_layers)
            flop += sum(cost.rows(1, chosen.width, chosen.past) * (n_layers - row.join) for row in chosen.rows)
            peak = max(peak, pass_bytes(runtime, chosen))
        else:
            longest = int(bases.lengths[branches.base[chosen]].max())
            tokens += len(chosen) * longest
            token_layers += len(chosen) * longest * n_layers
            flop += cost.rows(len(chosen), longest, 0) * n_layers
            peak = max(peak, len(chosen) * longest * plain_token_bytes(runtime, longest))
    flop += sum(map(len, bases.run_ids)) * cost.per_token * n_layers
    return Estimate(
        title, bases.path, bases.reason, len(branches.live), int(branches.pruned.sum()), len(passes), tokens, token_layers, naive,
        work, flop, flop / speed(str(runtime.device), runtime.dtype), int(peak + trunk_bytes(runtime, bases, together)),
    )  # fmt: skip


def estimate_ordinary(runtime: Runtime, prompts: Sequence[Sized], title: str, *, kept: int = 0) -> Estimate:
    """The cost of running each prompt once, whole, with ``kept`` bytes of activations held at a time."""
    cost, n_layers = runtime.cost, runtime.geometry.n_layers
    lengths = [len(prompt) for prompt in prompts]
    token_layers = sum(lengths) * n_layers
    flop = sum(cost.rows(1, length, 0) for length in lengths) * n_layers
    peak = max(length * plain_token_bytes(runtime, length) for length in lengths)
    return Estimate(
        title, "plain", "ordinary forward passes", len(lengths), 0, len(lengths), sum(lengths), token_layers, token_layers,
        token_layers * cost.per_token, flop, flop / speed(str(runtime.device), runtime.dtype), int(peak + kept),
    )  # fmt: skip


def trunk_bytes(runtime: Runtime, bases: Bases, together: int | None = None) -> int:
    """Memory that the runs of bases and references keep: residual stream, keys, values and the donors' sites."""
    geometry, size = runtime.geometry, runtime.dtype.itemsize
    sites = len({component for component, _ in bases.slots})
    width = (
        geometry.d_model + 2 * geometry.n_kv_heads * geometry.head_dim + sites * max(geometry.d_mlp, geometry.d_model)
    )
    runs = len(bases) * (1 if bases.reference is None else 2)
    return min(runs, together or runs) * int(bases.lengths.max()) * width * (geometry.n_layers + 1) * size


@functools.cache
def speed(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product of the size that passes have, measured once."""
    size = 512
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, 2 * size, device=device).to(dtype)

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    left @ right
    wait()
    begin = time.perf_counter()
    for _ in range(8):
        left @ right
    wait()
    # Passes reach about two thirds of a bare product's speed: norms, activations and copies take the rest.
    return 8 * 2 * size * size * 2 * size / (time.perf_counter() - begin) * 0.66
