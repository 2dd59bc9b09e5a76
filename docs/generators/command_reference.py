"""The reference of the command line as Markdown, from the typer application."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from nsp.cli.app import app

INTRO = """\
# Command line

This page is made from the application: `nsp COMMAND --help` prints the same. Exit codes: 0; 1, a run failed (or `validate`,
`diff` and `rerun` found a difference); 2, wrong input; 130, interrupted. `--debug`, anywhere on the line, shows the
traceback of an error. `nsp --install-completion` lets the shell complete commands and options.
"""


def command_reference() -> str:
    """The page: a section a command, with its usage, what it does, its arguments and options."""
    return "\n".join([INTRO, *_sections(typer.main.get_command(app), "nsp")])


def commands(command: Any, name: str = "nsp") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    children = getattr(command, "commands", {})
    if not children:
        yield name, command
    for child, inner in children.items():
        yield from commands(inner, f"{name} {child}")


def _sections(group: Any, name: str) -> Iterator[str]:
    for full, command in commands(group, name):
        context = command.context_class(command, info_name=full)
        usage = command.get_usage(context).removeprefix("Usage: ")
        yield f"## {full}\n\n```text\n{usage}\n```\n\n{inspect.cleandoc(command.help or '')}\n"
        records = [param.get_help_record(context) for param in command.get_params(context) if not _hidden(param)]
        rows = [f"| `{_cell(option)}` | {_cell(text)} |" for option, text in filter(None, records)]
        yield "\n".join(["| argument or option | meaning |", "| --- | --- |", *rows]) + "\n"


def _hidden(param: Any) -> bool:
    return bool(getattr(param, "hidden", False)) or param.name in ("help", "install_completion", "show_completion")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
