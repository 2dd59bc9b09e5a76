"""Run a job into a store: create or resume it, compute what is missing, mark it complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr
from rich.console import Console

from nsp.errors import InputError
from nsp.experiments.job import BranchProgress, Job, ReadsItsStore
from nsp.experiments.registry import EXPERIMENTS
from nsp.progress import branch_bar

if TYPE_CHECKING:
    from nsp.backends.ledger import Ledger
    from nsp.experiments.ray_workers import Spread
    from nsp.stores import Run, RunWriter


def run(
    job: Job,
    *,
    out: str | Path,
    force: bool = False,
    progress: bool | None = True,
    given: Mapping[str, Any] | None = None,
    store_dtype: str | None = None,
    repair: bool = False,
    ledger: Ledger | None = None,
    spread: Spread | None = None,
) -> Run:
    """Run ``job`` into the store at ``out``; ``given`` is the recipe as the user wrote it, kept beside the resolved
    one.

    ``ledger`` has the jobs that the run sends to a server; the header keeps their records, each with its unit. Jobs that
    were left there (see `nsp.experiments.detached`) are waited for.
    ``spread`` has the units computed by other processes (see `nsp.experiments.ray_workers`).
    ``store_dtype`` (float32, bfloat16, float16) rounds what is kept; ``repair`` checks finished units first and
    computes damaged ones again. An existing store of the same plan is resumed: finished units are never computed again. A store of another
        plan is an
    InputError unless ``force`` replaces it. Ctrl-C stops between passes and keeps what is finished.
    """
    from nsp.stores import open_run, open_writer

    place = str(out)
    console = Console(stderr=True, highlight=False)
    prepare_store(job, place, force=force, given=given, store_dtype=store_dtype)
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
        share = found / max(1, len(units))
        with branch_bar(branches, shown=progress if pending else False, finished=share) as advance:
            if spread is not None and pending:
                _spread(spread, job, writer, pending, place, advance, console)
            # A job that reads its store must find there what the unit before it computed.
            write = writer.write if isinstance(job, ReadsItsStore) else writer.write_behind
            with nullcontext() if ledger is None else ledger.taken_up(job_records(place)):
                for index in writer.work():
                    write(index, job.run_unit(units[index], advance))
                    if ledger is not None:
                        ledger.settle(True)
                        keep_jobs(writer, index, ledger.drain())
                if ledger is not None:
                    ledger.forget()
        finish(job, writer, place, computed=bool(pending))
    return open_run(place)


def prepare_store(
    job: Job,
    place: str,
    *,
    force: bool = False,
    given: Mapping[str, Any] | None = None,
    store_dtype: str | None = None,
) -> None:
    """Create the store of a run at ``place``, unless there is one already and not ``force``."""
    from nsp.stores import create_run

    if force or not _exists(place):
        header = dict(job.header) | ({} if given is None else {"recipe_given": given})
        create_run(place, job.template(), job.units, header=header, force=force, store_dtype=store_dtype)
    elif store_dtype is not None:
        _check_kept(job, place, store_dtype)


def _check_kept(job: Job, place: str, wanted: str) -> None:
    """InputError where this run's store keeps its results in another dtype than the one that is asked for."""
    from nsp.stores import open_run
    from nsp.stores.encode import CONVERTED_GROUPS

    kept = open_run(place)
    if kept.plan_hash != job.plan.hash:
        return  # another run's store, which opening it says
    nodes = [node for node in kept.tree.subtree if node.path.strip("/").partition("/")[0] in CONVERTED_GROUPS]
    floats = [variable for node in nodes for variable in node.data_vars.values() if variable.dtype.kind == "f"]
    found = {str(variable.attrs["store_dtype"]) for variable in floats if "store_dtype" in variable.attrs} or {"float32"}
    if floats and wanted not in found:
        raise InputError(
            f"{place} holds this run in {', '.join(found)}, not {wanted}; --force replaces the store, --out names another place"
        )


def finish(job: Job, writer: RunWriter, place: str, *, computed: bool) -> None:
    """Mark a run complete, if it is."""
    if computed:  # a run that was finished before stays as it is, byte for byte
        _keep_figures(job, writer, place)
    writer.mark("complete")


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
        keep_jobs(writer, index, made)
        if advance is not None:
            advance(total * len(done) // len(pending), total)

    spread(place, job.plan.hash, pending, finished, lambda text: console.print(text, soft_wrap=True))


def job_records(place: str) -> list[dict[str, Any]]:
    """The records of jobs on servers in the header of the store at ``place``."""
    from nsp.stores import open_run

    found: list[dict[str, Any]] = open_run(place).header.get("extra", {}).get("jobs", [])
    return found


def keep_jobs(writer: RunWriter, index: int, made: list[dict[str, Any]]) -> None:
    """Put the records of a unit's jobs into the header; a job that stands there already is replaced."""
    if not made:
        return

    def added(old: dict[str, Any]) -> dict[str, Any]:
        extra = old.get("extra", {})
        records = {job["id"]: job for job in extra.get("jobs", [])}
        for one in made:
            records[one["id"]] = {"unit": records.get(one["id"], {}).get("unit", index), **one}
        return old | {"extra": {**extra, "jobs": list(records.values())}}

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
    progress: bool | None = None,
    store_dtype: str | None = None,
) -> xr.DataTree:
    """The results of ``job``: run into a store at ``out``, or in memory alone where that is None.

    ``progress`` shows a bar; None shows one in a notebook alone.
    """
    if out is None:
        return run_in_memory(job, progress=progress)
    return run(job, out=out, force=force, progress=progress, store_dtype=store_dtype).tree


def run_in_memory(job: Job, *, progress: bool | None = None) -> xr.DataTree:
    """Run every unit of ``job`` and return its tree; nothing is kept on disk. ``progress`` as in `results`."""
    tree = job.template().copy(deep=True)
    if isinstance(job, ReadsItsStore):
        job.attach(lambda: tree)
    with branch_bar(_branches(job), shown=progress) as advance:
        for unit in job.units:
            for group, values in job.run_unit(unit, advance).items():
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
