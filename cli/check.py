"""`nsp check`: does every component of a model mean what its site table says?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nsp.cli.console import EXIT_FAILED, note, stderr, stdout
from nsp.errors import InputError


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A catalogue alias, a hub id, a directory or a .gguf file.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    sites: Annotated[Path | None, typer.Option(help="A JSON file that states the model's site table.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model's own Python code.")] = False,
) -> int:
    """Check that a model's components are what nsp takes them for. Exit code 1 where a line fails."""
    from nsp.model import load

    stated = None if sites is None else _read(sites)
    loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, sites=stated)
    told = stderr()
    progress = (lambda line: note(f"checking: {line}")) if told.is_terminal else None
    report = loaded.check(progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        stdout().print(report)
    return 0 if report.passed else EXIT_FAILED


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no site table: a JSON object was expected")
    return data
