"""Every `nsp` command that the README and the documentation print, with the page and line where it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^ *(```+|~~~+) *([\w-]*)")
_SPAN = re.compile(r"`([^`]+)`")
_OPEN = re.compile(r"(?<![\w.-])[A-Z]+(?![\w.-])")
_ALONE = ("nsp recipes", "nsp doctor", "nsp repl")
_NO_SHELL = {"python", "yaml", "json", "toml", "html", "css", "diff", "mermaid", "bibtex"}


@dataclass(frozen=True)
class Command:
    """One printed command: ``text`` as a reader would type it, without prompt and comment."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments after ``nsp``, without a redirection."""
        return shlex.split(self.text.partition(" > ")[0])[1:]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[Path]:
    """The README and every page under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def printed(path: Path) -> tuple[list[Command], list[Command]]:
    """(commands to type, mentions that leave something open) of a page, in its order.

    What stands in a block or a table cell is to be typed. In running text that is so where the command is whole: not
    ``nsp show``, which needs a store, nor ``nsp check MODEL``.
    """
    page = path.relative_to(ROOT).as_posix()
    typed, mentions = [], []
    fence: str | None = None
    shell = False
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
    for number, line in lines:
        mark = _FENCE.match(line)
        if mark and (fence is None or mark[1].startswith(fence)):
            fence = mark[1] if fence is None else None
            shell = fence is not None and mark[2] not in _NO_SHELL
        elif (fence is not None and shell) or (fence is None and line.startswith("    ")):
            text = line
            while text.endswith("\\"):
                text = f"{text[:-1].rstrip()} {next(lines)[1].strip()}"
            typed += [Command(page, number, found) for found in _commands(text)]
        elif fence is None:
            for text in (found for span in _SPAN.findall(line) for found in _commands(span)):
                whole = line.startswith("|") or (" " in text[4:] and not _OPEN.search(text))
                (typed if whole or text in _ALONE else mentions).append(Command(page, number, text))
    return typed, mentions


def _commands(text: str) -> Iterator[str]:
    """The nsp commands of a line of shell: between ``&&``, without prompt, comment and what a pipe leads to."""
    text = re.sub(r"(^|\s+)#(\s.*)?$", "", text.strip().removeprefix("$ "))
    for part in text.split(" && "):
        command = part.strip().partition(" | ")[0].strip()
        if re.match(r"nsp( [\w./~-]|$)", command) and command != "nsp":
            yield re.sub(r"\s+", " ", command)
