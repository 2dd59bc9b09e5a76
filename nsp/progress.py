"""Progress over branches: a bar on a terminal, one line that renews itself in a notebook, nothing in a log.

In a notebook the bar is rich's, drawn into one output of the cell: no widgets are needed, a run that is over in a moment
shows nothing, and a saved notebook keeps the bar's last state.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

BranchProgress = Callable[[int, int], None]  # (branches done, branches in all) of the request at hand

_PATIENCE = 1.0  # seconds before a notebook shows anything
_PAUSE = 0.2  # between two states in a notebook
_COLUMNS = 90
_LINE = '<pre style="margin:0;line-height:normal;background:transparent;color:inherit;overflow-x:auto">{code}</pre>'


@contextmanager
def branch_bar(
    total: int | None = None, *, shown: bool | None = None, finished: float = 0.0
) -> Iterator[BranchProgress | None]:
    """A progress bar with rate and time left; yields a callback for the engine, or None where nothing is shown.

    Args:
        total: branches in all, over every request; None where there is one request, which tells it.
        shown: whether to show it; None: in a notebook alone.
        finished: the share that was done before.
    """
    console = Console(stderr=True, highlight=False)
    if total == 0 or not (console.is_jupyter if shown is None else shown):
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    begin = time.monotonic()
    bar = Progress(*columns, console=console, transient=not console.is_terminal)
    line = _NotebookLine(bar) if console.is_jupyter else None
    with bar if line is None else nullcontext():
        task = bar.add_task("branches", total=total, completed=int((total or 0) * finished), rate="")
        state = {"last": 0, "done": 0}

        def advance(done: int, every: int) -> None:
            # The engine counts from 0 again for each request; a smaller number begins a new one.
            step = done - state["last"] if done >= state["last"] else done
            state["last"], state["done"] = done, state["done"] + step
            rate = state["done"] / max(1e-6, time.monotonic() - begin)
            bar.update(task, advance=step, rate=f"{rate:,.0f}/s", total=every if total is None else total)
            if line is not None:
                line.renew()

        yield advance
        if total is not None:
            bar.update(task, completed=total)
        if line is not None:
            line.renew(last=True)


class _NotebookLine:
    """A bar as one output of a notebook's cell."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._output: Any = None
        self._next = time.monotonic() + _PATIENCE

    def renew(self, *, last: bool = False) -> None:
        """Draw the bar as it is, at most five times a second; the ``last`` state only where one was drawn before."""
        now = time.monotonic()
        if self._output is None if last else now < self._next:
            return
        self._next = now + _PAUSE
        drawn = self._drawn()
        if self._output is None:
            from IPython.display import display

            self._output = display(drawn, raw=True, display_id=True)
        else:
            self._output.update(drawn, raw=True)

    def _drawn(self) -> dict[str, str]:
        paper = Console(record=True, file=io.StringIO(), width=_COLUMNS, force_jupyter=False, highlight=False)
        paper.print(self._bar.get_renderable())
        plain = paper.export_text(clear=False).rstrip()
        return {"text/html": paper.export_html(inline_styles=True, code_format=_LINE).rstrip(), "text/plain": plain}
