"""Run a job into a store: create or resume it, compute what is missing, mark it complete."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nsp.experiments.job import BranchProgress, Job, ReadsItsStore
from nsp.experiments.registry import EXPERIMENTS

if TYPE_CHECKING:
    from nsp.experiments.ray_workers import Spread
    from nsp.stores import Run, RunWriter


def run(
    job: Job,
    *,
    out: str | Path,
    force: bool = False,
    progress: bool = True,
    given: Mapping[str, Any] | None = None,
    store_dtype: str | None = None,
    repair: bool = False,
    jobs: Callable[[], list[dict[str, Any]]] | None = None,
    spread: Spread | None = None,
) -> Run:
    """Run ``job`` into the store at ``out``; ``given`` is the recipe as the user wrote it, kept beside the resolved
    one.

    ``jobs`` hands over the records of what was sent to a server; the header keeps them, each with its unit.
    ``spread`` has the units computed by other processes (see `nsp.experiments.ray_workers`).
    ``store_dtype`` (float32, bfloat16, float16) rounds what is kept; ``repair`` checks finished units first and
    computes damaged ones again. An existing store of the same plan is resumed: finished units are never computed again. A store of another
        plan is an
    InputError unless ``force`` replaces it. Ctrl-C stops between passes and keeps what is finished.
    """
    from nsp.stores import create_run, open_run, open_writer

    place = str(out)
    console = Console(stderr=True, highlight=False)
    if force or not _exists(place):
        header = dict(job.header) | ({} if given is None else {"recipe_given": given})
        create_run(place, job.template(), job.units, header=header, force=force, store_dtype=store_dtype)
    units = {unit.index: unit for unit in job.units}
    if isinstance(job, ReadsItsStore):
        job.attach(lambda: open_run(place).tree)
    with open_writer(place, job.plan.hash) as writer:
        if repair and (damaged := writer.invalidate_damaged()):
            console.print(f"{len(damaged)} damaged units of work are computed again", soft_wrap=True)
        pending = writer.pending()
        found = len(units) - len(pending)
        if found:
            console.print(
                f"found {found} of {len(units)} units of work finished in {place}"
                + ("; nothing is left to compute" if not pending else "; going on with the rest"),
                soft_wrap=True,
            )
        branches = _branches(job)
        with _bar(console, progress and bool(pending), branches, found / max(1, len(units))) as advance:
            if spread is not None and pending:
                _spread(spread, job, writer, pending, place, advance, console)
            # A job that reads its store must find there what the unit before it computed.
            write = writer.write if isinstance(job, ReadsItsStore) else writer.write_behind
            for index in writer.work():
                write(index, job.run_unit(units[index], advance))
                _keep_jobs(writer, index, [] if jobs is None else jobs())
        if pending:  # a run that was finished before stays as it is, byte for byte
            _keep_figures(job, writer, place)
        writer.mark("complete")
    return open_run(place)


def _spread(
    spread: Spread,
    job: Job,
    writer: RunWriter,
    pending: Sequence[int],
    place: str,
    advance: BranchProgress | None,
    console: Console,
) -> None:
    """Have the pending units computed elsewhere, with the bar over all of them."""
    done: list[int] = []
    total = _branches(job) * len(pending) // max(1, len(job.units))

    def finished(index: int, made: list[dict[str, Any]]) -> None:
        done.append(index)
        _keep_jobs(writer, index, made)
        if advance is not None:
            advance(total * len(done) // len(pending), total)

    spread(place, job.plan.hash, pending, finished, lambda text: console.print(text, soft_wrap=True))


def _keep_jobs(writer: RunWriter, index: int, made: list[dict[str, Any]]) -> None:
    """Put the records of a unit's jobs into the header."""
    if not made:
        return

    def added(old: dict[str, Any]) -> dict[str, Any]:
        extra = old.get("extra", {})
        return old | {"extra": {**extra, "jobs": [*extra.get("jobs", []), *({"unit": index, **one} for one in made)]}}

    with writer.backend.wait_lock("header"):
        writer.update_header(added)


def _keep_figures(job: Job, writer: RunWriter, place: str) -> None:
    """Put a finished run's main figure and its size into the header, where `nsp ls` finds them without reading an array."""
    from nsp.stores import open_run

    if writer.pending():
        return
    found: dict[str, Any] = {}
    experiment = EXPERIMENTS.get(job.plan.kind)
    if experiment is not None and experiment.headline is not None:
        found["headline"] = experiment.headline(open_run(place).tree)
    if Path(place).is_dir():
        found["bytes"] = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    if found:
        writer.update_header(lambda old: old | {"extra": {**old.get("extra", {}), **found}})


def results(
    job: Job,
    *,
    out: str | Path | None,
    force: bool = False,
    progress: bool = False,
    store_dtype: str | None = None,
) -> xr.DataTree:
    """The results of ``job``: run into a store at ``out``, or in memory alone where that is None."""
    if out is None:
        return run_in_memory(job)
    return run(job, out=out, force=force, progress=progress, store_dtype=store_dtype).tree


def run_in_memory(job: Job) -> xr.DataTree:
    """Run every unit of ``job`` and return its tree; nothing is kept on disk."""
    tree = job.template().copy(deep=True)
    if isinstance(job, ReadsItsStore):
        job.attach(lambda: tree)
    for unit in job.units:
        for group, values in job.run_unit(unit).items():
            dataset = tree[group].to_dataset()
            for name, value in values.items():
                region = {dim: at for dim, at in unit.regions[group].items() if dim in dataset[name].dims}
                dataset[name][region] = value
            tree[group] = xr.DataTree(dataset)
    tree.attrs |= dict(job.header)
    return tree


def _exists(place: str) -> bool:
    from nsp.stores.backend import locate

    return locate(place).exists()


def _branches(job: Job) -> int:
    schedule = job.plan.schedule
    return sum(one.branches for one in schedule.estimates) if schedule is not None else 0


@contextmanager
def _bar(console: Console, shown: bool, branches: int, finished: float) -> Iterator[BranchProgress | None]:
    """A progress bar over branches, with rate and time left; yields a callback for the engine."""
    if not shown or branches == 0:
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
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        task = bar.add_task("branches", total=branches, completed=int(branches * finished), rate="")
        state = {"last": 0, "done": 0}

        def advance(done: int, _total: int) -> None:
            # The engine counts from 0 again for each request; a smaller number begins a new one.
            step = done - state["last"] if done >= state["last"] else done
            state["last"], state["done"] = done, state["done"] + step
            rate = state["done"] / max(1e-6, time.monotonic() - begin)
            bar.update(task, advance=step, rate=f"{rate:,.0f}/s")

        yield advance
        bar.update(task, completed=branches)
