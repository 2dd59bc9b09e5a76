"""Run an experiment into a store or in memory: create or resume it, compute what is missing, mark it complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr
from rich.console import Console

from nsp.errors import InputError, NspError
from nsp.experiments import finished
from nsp.progress import BranchProgress, branch_bar

if TYPE_CHECKING:
    from nsp.backends.ledger import Ledger
    from nsp.experiments.experiment import Experiment, Unit
    from nsp.experiments.ray_workers import Spread
    from nsp.stores import Run, RunWriter


def run(
    experiment: Experiment[Any],
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
    """Run ``experiment`` into the store at ``out``.

    An existing store of the same plan is resumed: committed units are never computed again, and a stage that needs what
    earlier ones computed reads it from the store. Ctrl-C stops between passes and keeps what is committed.

    Args:
        experiment: a prepared run.
        out: the store's place: a directory or a URL.
        force: replace a store that holds another run.
        progress: whether to show a bar; None shows one in a notebook alone.
        given: the recipe as the user wrote it, kept beside the resolved one.
        store_dtype: float32, bfloat16 or float16: rounds what is kept.
        repair: check committed units first, and compute damaged ones again.
        ledger: the jobs that the run sends to a server; the header keeps their records, each with its unit. Jobs that
            were left there (see `nsp.experiments.detached`) are waited for.
        spread: has the units computed by other processes (see `nsp.experiments.ray_workers`).

    Raises:
        InputError: ``out`` holds another plan's run, or this run in another ``store_dtype``.
    """
    from nsp.stores import open_run, open_writer

    place = str(out)
    console = Console(stderr=True, highlight=False)
    prepare_store(experiment, place, force=force, given=given, store_dtype=store_dtype)
    with open_writer(place, experiment.plan.hash) as writer:
        units = stored_units(experiment, writer)
        if repair and (damaged := writer.invalidate_damaged()):
            console.print(f"{len(damaged)} damaged units of work are computed again", soft_wrap=True)
        pending = writer.pending()
        finished = len(units) - len(pending)
        if finished:
            console.print(
                f"found {finished} of {len(units)} units of work finished in {place}"
                + ("; nothing is left to compute" if not pending else "; going on with the rest"),
                soft_wrap=True,
            )
        share = finished / max(1, len(units))
        with branch_bar(_branches(experiment), shown=progress if pending else False, finished=share) as advance:
            if spread is not None and pending:
                _spread(spread, experiment, units, writer, pending, place, advance, console)
            with nullcontext() if ledger is None else ledger.taken_up(job_records(place)):
                for batch in batches(experiment, units, pending):
                    # Opened anew for each batch: what the batches before it committed is seen, by whomever.
                    stored = stored_groups(place)
                    for index in writer.work(batch):
                        writer.write_behind(index, experiment.compute(units[index], stored, advance))
                        if ledger is not None:
                            ledger.settle(True)
                            keep_jobs(writer, index, ledger.drain())
                if ledger is not None:
                    ledger.forget()
        finish(experiment, writer, place, computed=bool(pending))
    return open_run(place)


def stored_units(experiment: Experiment[Any], writer: RunWriter) -> dict[int, Unit]:
    """The experiment's units by the number that each has in the store: by what it fills, whoever numbered them.

    Raises NspError where the store was split into other units of work.
    """
    by_region = {_filled(experiment, unit.regions): unit for unit in experiment.units}
    try:
        return {index: by_region[_filled(experiment, writer.regions(index))] for index in range(writer.count)}
    except KeyError:
        raise NspError(
            f"{writer.backend.location} was split into other units of work by another version of nsp; --force replaces "
            "the store, --out names another place"
        ) from None


def _filled(experiment: Experiment[Any], regions: Mapping[str, Mapping[str, slice]]) -> frozenset[Any]:
    """What a unit fills, in one form: dims that it fills whole are left out."""
    return frozenset(
        (path, dim, at.start, at.stop)
        for path, region in regions.items()
        for dim, at in region.items()
        if (at.start, at.stop) != (0, experiment.blanks[path].sizes[dim])
    ) | {(path,) for path in regions}


def batches(experiment: Experiment[Any], units: Mapping[int, Unit], pending: Sequence[int]) -> list[list[int]]:
    """The pending units in the order in which they may run: a unit needs nothing of its own batch.

    A batch ends where a stage needs what one of its stages fills.
    """
    ordered: list[list[int]] = []
    filled: set[str] = set()
    by_stage = sorted(pending, key=lambda index: (units[index].stage, index))
    for _, indices in groupby(by_stage, key=lambda index: units[index].stage):
        stage = list(indices)
        if not ordered or filled & set(experiment.needs(units[stage[0]])):
            ordered.append([])
            filled = set()
        ordered[-1] += stage
        filled |= {path for index in stage for path in units[index].regions}
    return ordered


def stored_groups(place: str) -> Callable[[str], xr.Dataset]:
    """A reader of the groups of the run at ``place``, as they are committed when the first one is read."""
    from nsp.stores import open_run

    @cache
    def tree() -> xr.DataTree:
        return open_run(place).tree

    return lambda path: tree()[path].to_dataset()


def prepare_store(
    experiment: Experiment[Any],
    place: str,
    *,
    force: bool = False,
    given: Mapping[str, Any] | None = None,
    store_dtype: str | None = None,
) -> None:
    """Create the store of a run at ``place``, unless there is one already and not ``force``."""
    from nsp.stores import create_run

    if force or not _exists(place):
        header = experiment.header | ({} if given is None else {"recipe_given": given})
        create_run(
            place, experiment.template(), experiment.units, header=header, force=force, store_dtype=store_dtype
        )
    elif store_dtype is not None:
        _check_kept(experiment, place, store_dtype)


def _check_kept(experiment: Experiment[Any], place: str, wanted: str) -> None:
    """InputError where this run's store keeps its results in another dtype than the one that is asked for."""
    from nsp.stores import open_run
    from nsp.stores.encode import CONVERTED_GROUPS

    kept = open_run(place)
    if kept.plan_hash != experiment.plan.hash:
        return  # another run's store, which opening it says
    nodes = [node for node in kept.tree.subtree if node.path.strip("/").partition("/")[0] in CONVERTED_GROUPS]
    floats = [variable for node in nodes for variable in node.data_vars.values() if variable.dtype.kind == "f"]
    dtypes = {str(variable.attrs["store_dtype"]) for variable in floats if "store_dtype" in variable.attrs} or {"float32"}
    if floats and wanted not in dtypes:
        raise InputError(
            f"{place} holds this run in {', '.join(dtypes)}, not {wanted}; --force replaces the store, --out names another place"
        )


def finish(experiment: Experiment[Any], writer: RunWriter, place: str, *, computed: bool) -> None:
    """Mark a run complete, if it is."""
    if computed:  # a run that was finished before stays as it is, byte for byte
        _keep_figures(experiment, writer, place)
    writer.mark("complete")


def _spread(
    spread: Spread,
    experiment: Experiment[Any],
    units: Mapping[int, Unit],
    writer: RunWriter,
    pending: Sequence[int],
    place: str,
    advance: BranchProgress | None,
    console: Console,
) -> None:
    """Have the pending units computed elsewhere, with the bar over all of them."""
    done: list[int] = []
    total = _branches(experiment) * len(pending) // max(1, len(experiment.units))

    def finished(index: int, jobs: list[dict[str, Any]]) -> None:
        done.append(index)
        keep_jobs(writer, index, jobs)
        if advance is not None:
            advance(total * len(done) // len(pending), total)

    ordered = batches(experiment, units, pending)
    spread(place, experiment.plan.hash, ordered, finished, lambda text: console.print(text, soft_wrap=True))


def job_records(place: str) -> list[dict[str, Any]]:
    """The records of jobs on servers in the header of the store at ``place``."""
    from nsp.stores import open_run

    records: list[dict[str, Any]] = open_run(place).header.get("extra", {}).get("jobs", [])
    return records


def keep_jobs(writer: RunWriter, index: int, jobs: list[dict[str, Any]]) -> None:
    """Put the records of a unit's jobs into the header; a job that stands there already is replaced."""
    if not jobs:
        return

    def added(old: dict[str, Any]) -> dict[str, Any]:
        extra = old.get("extra", {})
        records = {record["id"]: record for record in extra.get("jobs", [])}
        for job in jobs:
            records[job["id"]] = {"unit": records.get(job["id"], {}).get("unit", index), **job}
        return old | {"extra": {**extra, "jobs": list(records.values())}}

    with writer.backend.wait_lock("header"):
        writer.update_header(added)


def _keep_figures(experiment: Experiment[Any], writer: RunWriter, place: str) -> None:
    """Put a finished run's main figure and its size into the header, where `nsp ls` finds them without reading an array."""
    from nsp.stores import open_run

    if writer.pending():
        return
    figures: dict[str, Any] = {}
    headline = finished.headline(open_run(place).tree)
    if headline is not None:
        figures["headline"] = headline
    if Path(place).is_dir():
        figures["bytes"] = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    if figures:
        writer.update_header(lambda old: old | {"extra": {**old.get("extra", {}), **figures}})


def results(
    experiment: Experiment[Any],
    *,
    out: str | Path | None,
    force: bool = False,
    progress: bool | None = None,
    store_dtype: str | None = None,
) -> xr.DataTree:
    """The results of ``experiment``: run into a store at ``out``, or in memory alone where that is None.

    ``progress`` shows a bar; None shows one in a notebook alone.
    """
    if out is None:
        return run_in_memory(experiment, progress=progress)
    return run(experiment, out=out, force=force, progress=progress, store_dtype=store_dtype).tree


def run_in_memory(experiment: Experiment[Any], *, progress: bool | None = None) -> xr.DataTree:
    """Run every unit of ``experiment`` and return its tree; nothing is kept on disk. ``progress`` as in `results`."""
    tree = experiment.template().copy(deep=True)
    groups = {path: tree[path].to_dataset() for unit in experiment.units for path in unit.regions}
    with branch_bar(_branches(experiment), shown=progress) as advance:
        for unit in experiment.units:
            for path, values in experiment.compute(unit, groups.__getitem__, advance).items():
                for name, value in values.items():
                    variable = groups[path][name].variable
                    region = {dim: at for dim, at in unit.regions[path].items() if dim in variable.dims}
                    variable[region] = value
    for path, group in groups.items():
        tree[path] = xr.DataTree(group)
    tree.attrs |= experiment.header
    return tree


def _branches(experiment: Experiment[Any]) -> int:
    """The branches of the whole run, as the plan counts them."""
    schedule = experiment.plan.schedule
    return 0 if schedule is None else sum(estimate.branches for estimate in schedule.estimates)


def _exists(place: str) -> bool:
    from nsp.stores.backend import locate

    return locate(place).exists()
