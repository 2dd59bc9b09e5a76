"""`nsp run`: recipes to results."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsp.cli.backends import jobs_line
from nsp.cli.console import (
    RunInterruptedError,
    experiments,
    note,
    open_tree,
    recipe_kinds,
    render_summary,
    stdout,
)
from nsp.errors import BackendError, InputError

if TYPE_CHECKING:
    from nsp.backends.options import BackendOptions
    from nsp.experiments.experiment import Experiment
    from nsp.experiments.ray_workers import Spread
    from nsp.model import Model
    from nsp.recipe import ModelOptions, ResolvedRecipe


def run(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Recipe files, or names of shipped recipes.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, dotted if need be: --set pairs.path=mine.csv."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Where the store goes; a folder for the stores, if it is one or there are several runs."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost; run nothing.")] = False,
    memory: Annotated[str | None, typer.Option(help="The most memory to use, such as 4GB.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Where the model runs: local, local-sim, ndif, ndif://host:port, ray, ray://host:port."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a store that holds another run.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with an interrupted run, as happens anyway, and compute damaged work again."
        ),
    ] = False,
    store_dtype: Annotated[
        str | None, typer.Option(help="Keep results rounded to float32, bfloat16 or float16; by default float32.")
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Leave the work on the server and return; `nsp jobs STORE --collect` fetches it."
        ),
    ] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress bar.")] = False,
) -> None:
    """Run recipes: patch, measure, store, and show the strongest sites.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    overrides = list(settings or [])
    for option, key, value in (
        ("memory", "memory", memory),
        ("device", "model.device", device),
        ("dtype", "model.dtype", dtype),
        ("backend", "backend", backend),
    ):
        if value is not None:
            overrides.append(f"--{option} {key}={value}")
    if store_dtype is not None:
        from nsp.stores.encode import check_store_dtype

        check_store_dtype(store_dtype)
    runs = _load(recipes, overrides, out)
    for item in runs:
        item.recipe.check()
    known = experiments()
    from nsp.experiments.detached import check_server

    for item in runs if detach else ():
        check_server(item.recipe.backend)
    number = 0
    for (options, place), group in _by_model(runs).items():
        model = _load_model(options, place)
        # Everything that can be wrong with any run of this model comes to light before the first one starts.
        jobs = [(item, _prepare(known[item.recipe.kind], model, item, len(runs))) for item in group]
        for item, job in jobs:
            number += 1
            if dry_run:
                _show_plan(item, job, store_dtype)
            else:
                order = f", {number} of {len(runs)}" if len(runs) > 1 else ""
                how: dict[str, Any] = {
                    "force": force,
                    "progress": not no_progress,
                    "repair": resume,
                    "store_dtype": store_dtype,
                }
                if detach:
                    _leave(item, job, model, force=force, store_dtype=store_dtype)
                    continue
                how |= {"ledger": model.ledger, "spread": _spread(item)}
                _execute(item, job, how, order)
        del model, jobs
        gc.collect()


def _load(recipes: Sequence[str], overrides: Sequence[str], out: str | None) -> list[ResolvedRecipe]:
    """Every run of every recipe, with its store; all that is wrong with any of them in one error."""
    from nsp.recipe import load_recipe_file

    kinds = recipe_kinds()
    runs: list[ResolvedRecipe] = []
    problems: dict[str, None] = {}
    for recipe in recipes:
        try:
            runs += load_recipe_file(recipe, overrides, kinds=kinds)
        except InputError as error:
            problems[str(error)] = None
    if problems:
        raise InputError("\n".join(problems))
    if out is not None:
        runs = _placed(runs, out)
    takers: dict[Path, ResolvedRecipe] = {}
    for item in runs:
        place = item.out.resolve()
        if place in takers:
            other = takers[place]
            raise InputError(
                f"{item.source} and {other.source} would both write {item.out}; give one another out, "
                "or put all stores into a folder with --out FOLDER"
            )
        takers[place] = item
        if item.out.is_file():
            raise InputError(f"{item.out} is a file; a store is a directory of its own")
    return runs


def _placed(runs: list[ResolvedRecipe], out: str) -> list[ResolvedRecipe]:
    """`--out` as `cp` takes its target: one run goes there; several, or any into an existing folder, go inside."""
    target = Path(out).expanduser()
    is_store = (target / "zarr.json").is_file()
    folder = out.endswith(("/", "\\")) or (target.is_dir() and not is_store)
    if len(runs) == 1 and not folder:
        return [runs[0].with_out(target)]
    if is_store or target.suffix == ".zarr":
        raise InputError(f"--out {out}: {len(runs)} runs do not fit into one store; give a folder")
    return [item.with_out(target / item.out.name) for item in runs]


def _by_model(runs: Sequence[ResolvedRecipe]) -> dict[tuple[ModelOptions, BackendOptions], list[ResolvedRecipe]]:
    """The runs by the model that they load and where, in order of first appearance."""
    groups: dict[tuple[ModelOptions, BackendOptions], list[ResolvedRecipe]] = {}
    for item in runs:
        groups.setdefault((item.recipe.model, item.recipe.backend), []).append(item)
    return groups


def _load_model(options: ModelOptions, backend: BackendOptions) -> Model:
    from nsp.experiments.models import load_model

    return load_model(options, backend)


def _spread(item: ResolvedRecipe) -> Spread | None:
    """Who else computes the run's units, where its backend is one of many workers."""
    if item.recipe.backend.kind != "ray":
        return None
    from nsp.experiments.ray_workers import spread_over

    return spread_over(item.resolved, item.recipe.backend)


def _prepare(kind: type[Experiment[Any]], model: Model, item: ResolvedRecipe, total: int) -> Experiment[Any]:
    try:
        return kind(model, item.recipe)
    except InputError as error:
        if total == 1:
            raise
        raise InputError(f"{item.label}: {error}") from error


def _show_plan(item: ResolvedRecipe, job: Experiment[Any], store_dtype: str | None) -> None:
    from nsp.stores import planned_bytes

    console = stdout()
    console.print(f"{item.label}: would write {item.out}", soft_wrap=True)
    console.print(job.plan.describe(console.width))
    size = sum(planned_bytes(job.template(), job.units, store_dtype).values())
    console.print(f"at most {size / 1e6:.1f} MB on disk, before compression", soft_wrap=True)


def _leave(item: ResolvedRecipe, job: Experiment[Any], model: Model, *, force: bool, store_dtype: str | None) -> None:
    """Hand a run's jobs to its server and say how to fetch them."""
    from nsp.experiments import runner
    from nsp.experiments.detached import advance

    place, given = str(item.out), {"file": item.given, "set": list(item.overrides)}
    assert model.ledger is not None
    runner.prepare_store(job, place, force=force, given=given, store_dtype=store_dtype)
    found = advance(job, place, model.ledger)
    note(f"{item.label}: {found}")
    if found.finished < found.units:
        note(f"nsp jobs {place} shows them; nsp jobs {place} --collect fetches what is ready")
    stdout().print(f"results: {place}", soft_wrap=True)


def _execute(item: ResolvedRecipe, job: Experiment[Any], how: Mapping[str, Any], number: str) -> None:
    from nsp.experiments import finished, runner

    note(f"{item.label}{number}: results go to {item.out}")
    try:
        given = {"file": item.given, "set": list(item.overrides)}
        stored = runner.run(job, out=item.out, given=given, **how)
    except KeyboardInterrupt:
        message = f"interrupted; finished work is kept in {item.out}, and the same command goes on from there"
        raise RunInterruptedError(message) from None
    except BackendError as error:
        raise BackendError(f"{error}; finished work is kept in {item.out}, and --resume goes on from there") from error
    console = stdout()
    render_summary(console, finished.summary(open_tree(str(item.out))))
    if line := jobs_line(stored.header):
        console.print(line, soft_wrap=True)
    console.print(f"results: {item.out}", soft_wrap=True)
