"""`nsp status` and `nsp jobs`: what runs on servers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nsp.cli.console import note, stdout
from nsp.errors import InputError


def status(
    backend: Annotated[
        str, typer.Option(help="The server: ndif, or ndif://host:port; the address is otherwise NDIF_HOST's.")
    ] = "ndif",
) -> None:
    """Show the models of a server, their states, and the versions on both sides."""
    from nsp.backends.options import backend_options

    options = backend_options(backend)
    options = options.inner if options.inner is not None else options
    if options.kind != "ndif":
        raise InputError(f"status asks a server; {backend} has none. Write --backend ndif or ndif://host:port")
    from nsp.backends.status import server_status

    try:
        found = server_status(options)
    except LookupError as error:
        raise InputError(f"{options.host}: no NDIF server answers there ({error} is unknown to it)") from None
    console = stdout()
    console.print(f"server {found.host}", soft_wrap=True)
    models = Table("model", "revision", "state", "level")
    for model in found.models:
        models.add_row(model.name, model.revision, model.state, model.level)
    console.print(models if found.models else "no model is deployed; the first job of one deploys it")
    versions = Table("package", "here", "there")
    for name, here, there in found.versions:
        versions.add_row(name, here, there if there in (here, "unknown") else f"{there} (differs)")
    console.print(versions)


def jobs(
    store: Annotated[
        str | None,
        typer.Argument(metavar="[STORE]", help="A store that nsp run wrote; by default every one below ./runs."),
    ] = None,
    states: Annotated[
        bool, typer.Option("--states", help="Ask the server for the state of every job, not of waiting ones alone.")
    ] = False,
    collect: Annotated[
        bool, typer.Option("--collect", help="Fetch what is ready, commit it, and leave what comes next on the server.")
    ] = False,
) -> None:
    """Show the jobs that runs sent to a server: ids, states, bytes sent and received, seconds and attempts.

    `nsp run --detach` leaves jobs on a server; --collect fetches them, in any process.
    """
    if store is None:
        if collect:
            raise InputError("--collect takes one store: nsp jobs STORE --collect; without it nsp jobs lists stores")
        _list_stores()
        return
    if collect:
        _collect(store)
    from nsp.stores import open_run

    run = open_run(store)
    records = _records(run.header)
    if not records:
        note(f"{store}: no job was sent to a server")
        return
    shown = Table("unit", "job", "state")
    for title in ("sent", "received", "seconds", "attempts"):
        shown.add_column(title, justify="right")
    for record in records:
        state = str(record.get("state", "done"))
        if states or state == "waiting":
            state = _state(run.recipe.get("backend"), record)
        numbers = [
            f"{record['sent']:,} B",
            f"{record['received']:,} B",
            f"{record['seconds']:.2f}",
            str(record["attempts"]),
        ]
        shown.add_row(str(record["unit"]), str(record["id"]), state, *numbers)
    console = stdout()
    console.print(shown)
    console.print(jobs_line(run.header), soft_wrap=True)


def jobs_line(header: Mapping[Any, Any]) -> str:
    """How many jobs a store's header tells of, and their sizes, in a line; empty where there are none."""
    records = _records(header)
    if not records:
        return ""
    total = {key: sum(record[key] for record in records) for key in ("sent", "received", "seconds")}
    waiting = sum(record.get("state") == "waiting" for record in records)
    return (
        f"{len(records)} jobs, {total['sent']:,} B sent, {total['received']:,} B received, {total['seconds']:.1f} s"
        + (f"; {waiting} of them wait on the server" if waiting else "")
    )


def _records(header: Mapping[Any, Any]) -> list[dict[str, Any]]:
    return list(header.get("extra", {}).get("jobs", []))


def _list_stores() -> None:
    from nsp.stores.listing import list_runs

    shown = Table("store", "state", "jobs")
    found = [(run, jobs_line(run.header)) for run in list_runs("runs")] if Path("runs").is_dir() else []
    for run, line in found:
        if line:
            shown.add_row(str(run.path), run.summary()["state"], line)
    if not shown.rows:
        note("no run below ./runs has sent a job to a server")
        return
    stdout().print(shown)


def _collect(store: str) -> None:
    """Take a run up in this process: fetch what is ready, and leave its next requests on the server."""
    from nsp.experiments.detached import advance, check_server
    from nsp.experiments.models import load_model
    from nsp.experiments.registry import experiment_of
    from nsp.recipe_errors import checked
    from nsp.stores import open_run

    stored = open_run(store)
    if stored.state == "complete":
        note(f"{store}: all units of work are finished")
        return
    kind = experiment_of(stored.kind, store)
    recipe = checked(kind.recipe_class, stored.recipe)
    check_server(recipe.backend)
    model = load_model(recipe.model, recipe.backend)
    assert model.ledger is not None
    note(f"{store}: {advance(kind(model, recipe), store, model.ledger)}")


def _state(backend: Any, record: Mapping[str, Any]) -> str:
    from nsp.backends.options import backend_options
    from nsp.backends.status import job_state

    options = backend_options(backend)
    options = options.inner if options.inner is not None else options
    if record.get("host"):
        options = options.model_copy(update={"host": record["host"]})
    return job_state(options, str(record["id"]))
