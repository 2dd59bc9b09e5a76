"""`nsp plot`: figures of a store, static (png, svg, pdf) or interactive (html)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsp.cli.console import open_tree, stdout
from nsp.cli.files import new_file
from nsp.errors import InputError, suggestion

if TYPE_CHECKING:
    import xarray as xr

    from nsp.report.figures import Picture

STATIC = (".png", ".pdf", ".svg")
INTERACTIVE = (".html", ".htm")
_ONE_FIGURE = ("heatmap", "bars", "capture")  # several components are panels of one file, where --out names it


def _which(text: str) -> str:
    """A pair's number, or mean."""
    if text != "mean" and not text.lstrip("-").isdecimal():
        raise typer.BadParameter(f"{text!r} is neither a number nor mean")
    return text


def plot(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A store that nsp run wrote.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The figure (png, pdf, svg; html to point at); by default beside the store."),
    ] = None,
    what: Annotated[
        str | None,
        typer.Option(
            help="heatmap, bars (by layer), scatter (effect against attribution), faithfulness (curves), patchscope "
            "(success), lens (top tokens), steering, pair-gaps, capture, or another name of the run's report; by default "
            "what suits the run."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="A metric, or effect (its normalised form, the default); of a scatter, the attribution."),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="A component (of faithfulness, an ablation); by default each that the run has.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(parser=_which, metavar="N|mean", help="Which pair or prompt, counted from 0 (the default); or their mean."),
    ] = None,
    head: Annotated[int | None, typer.Option(help="One head; by default the strongest in each cell.")] = None,
    neuron: Annotated[int | None, typer.Option(help="One neuron; by default the strongest in each cell.")] = None,
) -> None:
    """Draw a run: layers against positions with their tokens, or whatever suits it; another figure by --what."""
    if out is not None and out.suffix.lower() not in (*STATIC, *INTERACTIVE):
        raise InputError(f"{out}: a figure ends in {', '.join((*STATIC, INTERACTIVE[0]))}")
    tree = open_tree(store)
    from nsp.experiments.run_figures import drawable, named, picture_of

    figures = named(tree, what)
    what = figures[0].what
    known = drawable(tree, what)
    if component is not None and component not in known:
        raise InputError(f"{store} has no component {component!r}{suggestion(component, known)} ({', '.join(known)})")
    chosen = [component] if component is not None else list(known)
    if out is not None and len(chosen) > 1 and what not in _ONE_FIGURE:
        raise InputError(f"{store} has several of these; choose one with --component ({', '.join(chosen)})")
    units = {dim: index for dim, index in (("head", head), ("neuron", neuron)) if index is not None}
    if units and what != "heatmap":
        raise InputError("--head and --neuron choose what a heatmap shows; leave them out for another figure")
    item: Any = "mean" if pair == "mean" else int(pair) if pair is not None else None
    titled = (item or 0) if what == "heatmap" and item != "mean" else None
    # A file of its own for each component, or one for all of them where its name is given.
    for names in [chosen] if out is not None or not chosen else [[name] for name in chosen]:
        picture = picture_of(tree, what, names, metric, item, units=units, title=_title(tree, ", ".join(names) or what, titled))
        if what != "heatmap":
            ending = what if metric is None else f"{what}-{metric}"
        else:
            ending = metric or next(view.metric for figure in figures for view in figure.views if view.component == names[0])
        target = out or _beside(store, f"{_file_part(names[0])}-{ending}.png" if names else f"{ending}.png")
        _write(picture, target)
        stdout().print(f"wrote {target}", soft_wrap=True)


def _write(picture: Picture, target: Path) -> None:
    from nsp.report.drawing import draw

    interactive = target.suffix.lower() in INTERACTIVE
    drawn = draw(picture, interactive=interactive)
    with new_file(target) as temporary:
        if interactive:
            drawn.write_html(temporary, include_plotlyjs=True, include_mathjax=False)
        else:
            drawn.savefig(temporary)


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
    names: Any = inputs["pair_name"].values if "pair_name" in inputs else []
    if pair is not None and len(names) > 1 and 0 <= pair < len(names):
        words.append(str(names[pair]))
    return " · ".join(word for word in words if word)


def _entry(mapping: Any, key: str) -> str:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    return value if isinstance(value, str) else ""


def _file_part(component: str) -> str:
    return "".join(char if char.isalnum() or char in "_.-" else "-" for char in component)
