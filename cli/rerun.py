"""`nsp rerun`: a stored run again, and whether the numbers are the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from nsp.cli.console import EXIT_FAILED, note, stdout


def rerun(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store that nsp run wrote.")],
    out: Annotated[Path | None, typer.Option(help="Keep the second run here; by default it is thrown away.")] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress bar.")] = False,
) -> None:
    """Run a store's recipe again and compare: the largest differences, and what differs in model and versions.

    Exit code 1 where a number differs.
    """
    import nsp
    from nsp.experiments import runner
    from nsp.experiments.registry import experiment_of
    from nsp.recipe_errors import checked
    from nsp.stores import diff, open_run

    stored = open_run(store)
    kind = experiment_of(stored.kind, store)
    recipe = checked(kind.recipe_class, stored.recipe)
    model = nsp.load(recipe.model.name, **recipe.model.model_dump(exclude={"name"}))
    with tempfile.TemporaryDirectory() as folder:
        place = out or Path(folder) / "rerun.zarr"
        note(f"running {store} again into {place if out else 'a temporary store'}")
        runner.run(kind(model, recipe), out=place, progress=not no_progress)
        found = diff(store, str(place))
    console = stdout()
    for line in found.lines():
        console.print(line, soft_wrap=True)
    if not found.same_numbers:
        raise typer.Exit(EXIT_FAILED)
