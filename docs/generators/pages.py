"""What the build does to the text of pages: links out of docs/, included files and notebooks. Needs no mkdocs."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api_reference import api_pages
from command_reference import command_reference
from recipe_reference import recipe_reference

ROOT = Path(__file__).parents[2]

# Files outside docs/ that have a page of their own, by their path in the repository.
HOMES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "performance.md",
}
# What is in the repository and not on the site: such a link loses its target and keeps its text.
_SOURCES = (".py", ".toml", ".txt", "LICENSE")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)
_INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)


def with_site_links(text: str, page: str) -> str:
    """A page's text with links into the repository turned into links between pages.

    Args:
        page: the path of the page that holds the text, below the repository's root (``docs/patching.md``).
    """
    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(lambda m: _link(m, page), part) for part in parts)


def _link(match: re.Match[str], page: str) -> str:
    label, target = match[1], match[2]
    if "://" in target or target.startswith(("#", "mailto:")):
        return match[0]
    path, mark, anchor = target.partition("#")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    if place.endswith(_SOURCES):
        return label
    found = site_page(place)
    if found is None:
        return match[0]
    return f"[{label}]({found}{mark}{anchor})" if mark or "#" not in found else f"[{label}]({found})"


def site_page(place: str) -> str | None:
    """The page (of those that lie flat in docs/) that shows a file of the repository, or None where there is none."""
    if place in HOMES:
        return HOMES[place]
    folder, _, name = place.rpartition("/")
    if folder == "recipes" and name.endswith(".yaml"):
        return f"shipped-recipes.md#{name.removesuffix('.yaml')}"
    if folder == "examples" and name.endswith(".ipynb"):
        return notebook_page(Path(name))
    return name if folder == "docs" else None


def with_includes(text: str) -> str:
    """A page's text with ``<!-- include: PATH -->`` replaced by the file's text, without its title."""

    def included(match: re.Match[str]) -> str:
        body = (ROOT / match[1]).read_text(encoding="utf-8")
        return with_site_links(re.sub(r"\A# .*\n", "", body), match[1])

    return _INCLUDE.sub(included, text)


def repository_page(path: str) -> str:
    """A file of the repository as a page."""
    return with_site_links((ROOT / path).read_text(encoding="utf-8"), path)


def generated_pages() -> dict[str, str]:
    """The text of every page that no file in docs/ holds, by its path below docs/, but the notebooks'."""
    return {
        "recipe-reference.md": recipe_reference(),
        "command-reference.md": command_reference(),
        "shipped-recipes.md": shipped_recipes(),
        "contributing.md": repository_page("CONTRIBUTING.md"),
        "changelog.md": repository_page("CHANGELOG.md"),
        **api_pages(),
    }


def shipped_recipes() -> str:
    """Every shipped recipe as it stands."""
    parts = [
        "# Shipped recipes\n\n`nsp run NAME` runs one, `nsp recipes NAME` prints it to start your own from. "
        "What the keys mean: [recipe keys](recipe-reference.md).\n"
    ]
    parts += [
        f"## {path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```\n"
        for path in sorted((ROOT / "recipes").glob("*.yaml"))
    ]
    return "\n".join(parts)


def notebooks() -> list[Path]:
    """The notebooks of examples/."""
    return sorted((ROOT / "examples").glob("*.ipynb"))


def notebook_page(path: Path) -> str:
    """The page of a notebook."""
    return f"notebook-{path.stem}.md"


def with_notebooks(text: str) -> str:
    """A page's text with ``<!-- notebooks -->`` replaced by a list of them, by their titles."""
    lines = []
    for path in notebooks():
        title = re.search(r"^# (.+)$", notebook_text(path), re.MULTILINE)
        lines.append(f"- [{title[1] if title else path.stem}]({notebook_page(path)})")
    return text.replace("<!-- notebooks -->", "\n".join(lines))


def notebook_text(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the outputs that are stored in it as text or as pictures."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(with_site_links(source, f"examples/{path.name}"))
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"```python\n{source}\n```")
            parts += [shown for output in cell.get("outputs", []) if (shown := _output(output))]
    parts.append(f"*This page is the notebook `examples/{path.name}` of the repository.*")
    return "\n\n".join(parts) + "\n"


def _output(output: Mapping[str, Any]) -> str:
    if output["output_type"] == "stream":
        return _block("".join(output["text"])) if output.get("name") == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="the figure that this cell draws" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    return _block("".join(data["text/plain"])) if "text/plain" in data else ""


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
