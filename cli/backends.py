"""`nsp status` and `nsp jobs`: what runs on servers."""

from __future__ import annotations

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
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store that nsp run wrote.")],
    states: Annotated[
        bool, typer.Option("--states", help="Ask the server for the last state that it kept of each job.")
    ] = False,
) -> None:
    """Show the jobs that a run sent to a server: their ids, bytes sent and received, seconds and attempts."""
    from nsp.stores import open_run

    run = open_run(store)
    records: list[dict[str, Any]] = list(run.header.get("extra", {}).get("jobs", []))
    if not records:
        note(f"{store}: no job was sent to a server")
        return
    known = [_state(run.recipe.get("backend"), record["id"]) for record in records] if states else []
    shown = Table("unit", "job", *(["state"] if states else []))
    for title in ("sent", "received", "seconds", "attempts"):
        shown.add_column(title, justify="right")
    for number, record in enumerate(records):
        middle = [known[number]] if states else []
        numbers = [
            f"{record['sent']:,} B",
            f"{record['received']:,} B",
            f"{record['seconds']:.2f}",
            str(record["attempts"]),
        ]
        shown.add_row(str(record["unit"]), str(record["id"]), *middle, *numbers)
    console = stdout()
    console.print(shown)
    total = {key: sum(record[key] for record in records) for key in ("sent", "received", "seconds")}
    console.print(
        f"{len(records)} jobs, {total['sent']:,} B sent, {total['received']:,} B received, {total['seconds']:.1f} s",
        soft_wrap=True,
    )


def _state(backend: Any, job: str) -> str:
    from nsp.backends.options import backend_options
    from nsp.backends.status import job_state

    options = backend_options(backend)
    return job_state(options.inner if options.inner is not None else options, job)
