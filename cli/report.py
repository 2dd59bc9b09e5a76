"""`nsp report`: runs as one HTML page to look at and to send."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from nsp.cli.console import experiments, note, open_tree, stdout
from nsp.cli.files import new_file
from nsp.errors import InputError
from nsp.recipe_errors import suggestion


def report(
    store: Annotated[list[str], typer.Argument(metavar="STORE...", help="Stores that nsp run wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Make a self-contained HTML page of one run, or of several side by side."""
    from nsp.report.page import Section, page

    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: a report ends in .html")
    known, sections = experiments(), []
    for location in store:
        tree = open_tree(location)
        kind = str(tree.attrs["kind"])
        if kind not in known:
            raise InputError(f"{location}: nsp has no experiment {kind!r}{suggestion(kind, known)}")
        sections.append(Section(location, tree, known[kind].summarise(tree), _yaml(tree.attrs["recipe_resolved"])))
    note(f"writing {out}")
    text = page(sections)
    with new_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    stdout().print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)


def _yaml(recipe: Any) -> str:
    from ruamel.yaml import YAML

    yaml, text = YAML(typ="safe"), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump({key: value for key, value in recipe.items() if value is not None}, text)
    return text.getvalue()
