"""What mkdocs calls while it builds the site: the pages that are made from nsp itself, and the finish of every page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finish import fetched, with_formulas
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from pages import (
    generated_pages,
    notebook_page,
    notebook_text,
    notebooks,
    with_includes,
    with_notebooks,
    with_site_links,
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that no file in docs/ holds."""
    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    for notebook in notebooks():  # notebooks.md lists them
        path, text = notebook_page(notebook), notebook_text(notebook)
        files.append(File.generated(config, path, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between pages instead of links into the repository, and included files."""
    if page.file.generated_by is not None:
        return markdown
    text = with_site_links(markdown, f"docs/{page.file.src_uri}")
    return with_includes(with_notebooks(text))


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML."""
    return with_formulas(html)


def on_post_build(config: Any) -> None:
    """A site that would fetch anything is no site."""
    if found := fetched(Path(config["site_dir"])):
        raise PluginError("the site would fetch from the network:\n" + "\n".join(found))
