"""`nsp plot`: a heatmap of a store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsp.cli.console import open_tree, stdout
from nsp.errors import InputError
from nsp.recipe_errors import suggestion

if TYPE_CHECKING:
    import xarray as xr

FORMATS = (".png", ".pdf", ".svg")


def plot(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store that nsp run wrote.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The figure (png, pdf, svg); by default beside the store.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="A metric, or effect, its normalised form; by default effect.")
    ] = None,
    component: Annotated[str | None, typer.Option(help="A component; by default a figure for each.")] = None,
    pair: Annotated[int, typer.Option(help="Which pair of prompts, counted from 0.")] = 0,
    head: Annotated[int | None, typer.Option(help="One head; by default the strongest in each cell.")] = None,
    neuron: Annotated[int | None, typer.Option(help="One neuron; by default the strongest in each cell.")] = None,
) -> None:
    """Draw a run as a heatmap, layers against positions with their tokens."""
    if out is not None and out.suffix.lower() not in FORMATS:
        raise InputError(f"{out}: a figure ends in {', '.join(FORMATS)}")
    tree = open_tree(store)
    effects = _effects(tree, store)
    if component is not None and component not in effects:
        raise InputError(
            f"{store} has no component {component!r}{suggestion(component, effects)} ({', '.join(effects)})"
        )
    chosen = [component] if component is not None else list(effects)
    if out is not None and len(chosen) > 1:
        raise InputError(f"{store} has several components; choose one with --component ({', '.join(chosen)})")
    from nsp.report.figures import base_value, heatmap

    units = {dim: index for dim, index in (("head", head), ("neuron", neuron)) if index is not None}
    for name in chosen:
        dataset = effects[name]
        wanted = metric or ("effect" if "effect" in dataset else str(next(iter(dataset.data_vars))))
        base = None if wanted == "effect" else base_value(tree, wanted, pair)
        figure = heatmap(dataset, wanted, pair, base=base, units=units, title=_title(tree, name))
        target = out or store.with_name(f"{store.stem}-{_file_part(name)}-{wanted}.png")
        temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary)
            temporary.replace(target)
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror}") from None
        finally:
            temporary.unlink(missing_ok=True)
        stdout().print(f"wrote {target}", soft_wrap=True)


def _effects(tree: xr.DataTree, store: Path) -> dict[str, xr.Dataset]:
    if "effects" not in tree.children:
        raise InputError(f"{store} holds no effects to draw; it has the groups {', '.join(tree.children) or '(none)'}")
    found = {name: node.to_dataset() for name, node in tree["effects"].children.items()}
    return {name: dataset for name, dataset in found.items() if dataset.data_vars}


def _title(tree: xr.DataTree, component: str) -> str:
    words = [str(tree.attrs[key]) for key in ("name", "model", "mode") if isinstance(tree.attrs.get(key), str)]
    return " · ".join([component, *words])


def _file_part(component: str) -> str:
    return "".join(char if char.isalnum() or char in "_.-" else "-" for char in component)
