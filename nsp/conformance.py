"""The conformance list: does every component of a loaded model mean what its site table says?

Each line is an identity that must hold whatever the weights are (what is added to the residual stream adds up to it, patching a site with its own
value changes nothing, the branch path agrees with the plain one, ...). A deviation is given relative to the spread (standard deviation) of what it
is compared with, so that one tolerance serves every model; where a line says "bit for bit" it must be zero.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from nsp.conformance_bench import Bench, NotApplicable, Off
from nsp.conformance_lines import LINES
from nsp.engine.runtime import Runtime

Verdict = Literal["pass", "fail", "n/a"]
_STYLE = {"pass": "green", "fail": "bold red", "n/a": "dim"}

# Allowed deviation by dtype: what rounding explains over some tens of layers, far below what a misread component makes.
TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-8,
    torch.float32: 2e-4,
    torch.float16: 0.03,
    torch.bfloat16: 0.15,
}


@dataclass(frozen=True)
class Line:
    """One line of the check.

    Attributes:
        name: what must hold.
        verdict: ``pass``, ``fail`` or ``n/a``.
        deviation: the largest deviation found, relative to the spread of what it is compared with; None where nothing was compared.
        allowed: the largest deviation that passes; None where none was compared.
        detail: where the largest deviation is, why the line failed, or why it does not apply.
    """

    name: str
    verdict: Verdict
    deviation: float | None
    allowed: float | None
    detail: str

    def shown(self) -> tuple[str, str, str, str]:
        """Name, deviation, verdict and detail as text."""
        deviation = "-" if self.deviation is None else ("0" if self.deviation == 0 else f"{self.deviation:.1e}")
        if self.allowed is not None:
            deviation += " (exact)" if self.allowed == 0 else f" (< {self.allowed:.0e})"
        return self.name, deviation, self.verdict, self.detail


@dataclass(frozen=True)
class Report:
    """The check of one model; ``passed`` where no line failed."""

    model: str
    family: str
    dtype: str
    components: tuple[str, ...]
    lines: tuple[Line, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(line.verdict != "fail" for line in self.lines)

    @property
    def verdict(self) -> str:
        """One sentence that says how it went."""
        failed = [line.name for line in self.lines if line.verdict == "fail"]
        skipped = sum(line.verdict == "n/a" for line in self.lines)
        held = len(self.lines) - len(failed) - skipped
        if failed:
            return f"RED: {len(failed)} of {len(self.lines)} lines failed: {'; '.join(failed)}"
        return f"GREEN: {held} lines hold, {skipped} do not apply ({self.seconds:.0f} s)"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "components": list(self.components), "passed": self.passed, "verdict": self.verdict}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"{self.model}: {self.family}, {self.dtype}", style="bold")
        yield Text(f"components: {', '.join(self.components)}")
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("line", overflow="fold")
        table.add_column("largest deviation", justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("where, or why", overflow="fold", style="dim")
        for line in self.lines:
            name, deviation, verdict, detail = line.shown()
            table.add_row(Text(name), deviation, Text(verdict, style=_STYLE[verdict]), Text(detail))
        yield table
        yield Text(self.verdict, style="bold green" if self.passed else "bold red")

    def __str__(self) -> str:
        width = max(len(line.name) for line in self.lines)
        rows = [f"{name:<{width}}  {deviation:>20}  {verdict:<4}  {detail}" for name, deviation, verdict, detail in (
            line.shown() for line in self.lines)]  # fmt: skip
        return "\n".join([f"{self.model}: {self.family}, {self.dtype}", *rows, self.verdict])


def check(runtime: Runtime, name: str, progress: Callable[[str], None] | None = None) -> Report:
    """Run the conformance list on a loaded model; ``progress`` is told each line before it runs."""
    begin = time.perf_counter()
    tolerance = TOLERANCE.get(runtime.dtype, 0.15)
    bench = Bench(runtime, tolerance)
    lines = []
    for title, function in LINES:
        if progress is not None:
            progress(title)
        lines.append(_run(title, function, bench, tolerance))
    dtype = str(runtime.dtype).removeprefix("torch.")
    seconds = time.perf_counter() - begin
    return Report(name, runtime.geometry.table.name, dtype, runtime.geometry.components(), tuple(lines), seconds)


def _run(title: str, function: Callable[[Bench], Iterator[Off]], bench: Bench, tolerance: float) -> Line:
    exact = "bit for bit" in title
    allowed = 0.0 if exact else tolerance
    worst: Off | None = None
    detail = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for off in function(bench):
                if off.deviation is None:
                    detail = off.where
                elif worst is None or not off.deviation <= (worst.deviation or 0.0):
                    worst = off
                if worst is not None and math.isnan(worst.deviation or 0.0):
                    break
    except NotApplicable as reason:
        return Line(title, "n/a", None, None, str(reason))
    except Exception as error:
        # Whatever goes wrong inside a line is that line's failure, and the others still run.
        text = str(error).strip().splitlines()
        return Line(title, "fail", None, None, f"{type(error).__name__}: {text[-1][:200] if text else ''}")
    if worst is None:
        return Line(title, "pass", None, None, detail)
    held = worst.deviation is not None and worst.deviation <= allowed
    return Line(title, "pass" if held else "fail", worst.deviation, allowed, worst.where)
