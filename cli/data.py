"""`nsp data`: data sets that nsp fetches on request and never ships."""

from __future__ import annotations

from typing import Annotated

import typer

from nsp.errors import InputError

app = typer.Typer(help="Fetch data sets that recipes can use.", no_args_is_help=True)

_KNOWN = ("crows-pairs",)


@app.callback()
def _group() -> None:
    """Fetch data sets that recipes can use."""


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="The data set: crows-pairs.")],
    url: Annotated[
        str | None, typer.Option(help="Where to fetch it from, if not from its authors' repository.")
    ] = None,
) -> None:
    """Fetch a data set into nsp's cache, where recipes find it (pairs.source: crows-pairs)."""
    from nsp.cli.console import note
    from nsp.datasets import crows
    from nsp.experiments.bias_scan.data import pull_crows

    if name not in _KNOWN:
        raise InputError(f"no data set {name!r}; there is {', '.join(_KNOWN)}")
    path, known = pull_crows(url or crows.URL)
    note(f"CrowS-Pairs (Nangia et al. 2020) is under {crows.LICENCE}: name its authors, and share changes alike")
    if not known:
        note("the file is not byte for byte the published one; it reads as CrowS-Pairs and is kept")
    typer.echo(str(path))
