"""`nsp plot`: a heatmap of a store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsp.cli.console import open_tree, stdout
from nsp.errors import InputError
from nsp.recipe_errors import suggestion

if TYPE_CHECKING:
    import xarray as xr

FORMATS = (".png", ".pdf", ".svg")


def plot(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store that nsp run wrote.")],
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
        base = None if wanted.startswith("effect") else base_value(tree, wanted, pair)
        figure = heatmap(dataset, wanted, pair, base=base, units=units, title=_title(tree, name, pair))
        target = out or _beside(store, f"{_file_part(name)}-{wanted}.png")
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


def _beside(store: str, ending: str) -> Path:
    """The figure's place: beside a store on this disk, else in the working directory."""
    name = store.rstrip("/").rpartition("/")[2]
    folder = Path() if "://" in store else Path(store).parent
    return folder / f"{Path(name).stem}-{ending}"


def _effects(tree: xr.DataTree, store: str) -> dict[str, xr.Dataset]:
    if "effects" not in tree.children:
        raise InputError(f"{store} holds no effects to draw; it has the groups {', '.join(tree.children) or '(none)'}")
    found = {name: node.to_dataset() for name, node in tree["effects"].children.items()}
    return {name: dataset for name, dataset in found.items() if dataset.data_vars}


def _title(tree: xr.DataTree, component: str, pair: int) -> str:
    """What the figure shows, as far as the store says it: component, model, mode, the pair's name."""
    attrs = tree.attrs
    words = [component, _entry(attrs.get("model"), "name"), _entry(attrs.get("recipe_resolved"), "mode")]
    inputs = tree["inputs"].to_dataset() if "inputs" in tree.children else {}
    if "pair_name" in inputs and inputs["pair_name"].size > 1 and pair < inputs["pair_name"].size:
        words.append(str(inputs["pair_name"].values[pair]))
    return " · ".join(word for word in words if word)


def _entry(mapping: Any, key: str) -> str:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    return value if isinstance(value, str) else ""


def _file_part(component: str) -> str:
    return "".join(char if char.isalnum() or char in "_.-" else "-" for char in component)
