"""`nsp check`: does every component of a model mean what its site table says?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nsp.cli.console import EXIT_FAILED, note, stderr, stdout


def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A catalogue alias, a hub id, a directory or a .gguf file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model's own Python code.")] = False,
) -> int:
    """Check that a model's components are what nsp takes them for. Exit code 1 where a line fails."""
    from nsp.model import load

    loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    told = stderr()
    progress = (lambda line: note(f"checking: {line}")) if told.is_terminal else None
    report = loaded.check(progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        stdout().print(report)
    return 0 if report.passed else EXIT_FAILED
