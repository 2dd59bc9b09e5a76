"""`nsp plot`: figures of a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsp.cli.console import open_tree, stdout
from nsp.cli.files import new_file
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
    what: Annotated[
        str, typer.Option(help="heatmap, bars (by layer), scatter (effect against attribution), faithfulness (curves).")
    ] = "heatmap",
    metric: Annotated[
        str | None,
        typer.Option(help="A metric, or effect (its normalised form, the default); of a scatter, the attribution."),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="A component (of faithfulness, an ablation); by default a figure for each.")
    ] = None,
    pair: Annotated[int, typer.Option(help="Which pair of prompts, counted from 0.")] = 0,
    head: Annotated[int | None, typer.Option(help="One head; by default the strongest in each cell.")] = None,
    neuron: Annotated[int | None, typer.Option(help="One neuron; by default the strongest in each cell.")] = None,
) -> None:
    """Draw a run: a heatmap, layers against positions with their tokens, or another figure by --what."""
    if out is not None and out.suffix.lower() not in FORMATS:
        raise InputError(f"{out}: a figure ends in {', '.join(FORMATS)}")
    tree = open_tree(store)
    from nsp.experiments.run_figures import drawable, figure_of
    from nsp.report.charts import main_variable

    found = drawable(tree, what)
    if component is not None and component not in found:
        raise InputError(f"{store} has no component {component!r}{suggestion(component, found)} ({', '.join(found)})")
    chosen = [component] if component is not None else list(found)
    if not chosen:
        raise InputError(f"{store} has nothing to draw as {what!r}")
    if out is not None and len(chosen) > 1:
        raise InputError(f"{store} has several components; choose one with --component ({', '.join(chosen)})")
    units = {dim: index for dim, index in (("head", head), ("neuron", neuron)) if index is not None}
    if units and what != "heatmap":
        raise InputError("--head and --neuron choose what a heatmap shows; leave them out for another figure")
    titled = pair if what == "heatmap" else None
    for name in chosen:
        figure = figure_of(tree, what, name, metric, pair, units=units, title=_title(tree, name, titled))
        if what == "heatmap":
            ending = metric or main_variable(found[name])
        else:
            ending = what if metric is None else f"{what}-{metric}"
        target = out or _beside(store, f"{_file_part(name)}-{ending}.png")
        with new_file(target) as temporary:
            figure.savefig(temporary)
        stdout().print(f"wrote {target}", soft_wrap=True)


def _beside(store: str, ending: str) -> Path:
    """The figure's place: beside a store on this disk, else in the working directory."""
    name = store.rstrip("/").rpartition("/")[2]
    folder = Path() if "://" in store else Path(store).parent
    return folder / f"{Path(name).stem}-{ending}"


def _title(tree: xr.DataTree, component: str, pair: int | None) -> str:
    """What the figure shows, as far as the store says it: component, model, mode, the pair's name if it is of one."""
    attrs = tree.attrs
    words = [component, _entry(attrs.get("model"), "name"), _entry(attrs.get("recipe_resolved"), "mode")]
    inputs = tree["inputs"].to_dataset() if "inputs" in tree.children else {}
    if pair is not None and "pair_name" in inputs and inputs["pair_name"].size > 1 and pair < inputs["pair_name"].size:
        words.append(str(inputs["pair_name"].values[pair]))
    return " · ".join(word for word in words if word)


def _entry(mapping: Any, key: str) -> str:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    return value if isinstance(value, str) else ""


def _file_part(component: str) -> str:
    return "".join(char if char.isalnum() or char in "_.-" else "-" for char in component)
