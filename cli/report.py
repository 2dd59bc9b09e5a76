"""`nsp report`: runs as one HTML page to look at and to send."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsp.cli.console import note, open_tree, stdout
from nsp.cli.files import new_file
from nsp.errors import InputError


def report(
    store: Annotated[list[str], typer.Argument(metavar="STORE...", help="Stores that nsp run wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
) -> None:
    """Make a self-contained HTML page of one run, or of several side by side."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: a report ends in .html")
    runs = {location: open_tree(location) for location in store}
    from nsp.experiments.html_report import report_page

    note(f"writing {out}")
    text = report_page(runs)
    with new_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    stdout().print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
