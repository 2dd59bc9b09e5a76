"""`nsp repl`: a prompt at which circuits are found, ablated and amplified."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsp.cli.console import note, render_summary, stdout
from nsp.errors import InputError

if TYPE_CHECKING:
    from nsp.cli.repl_session import Session

PROMPT = "nsp> "


def repl(
    model: Annotated[str, typer.Option(help="An alias, a hub id, a directory or a .gguf file.")] = "smollm2",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    method: Annotated[str, typer.Option(help="Attribution method of discover.")] = "relp",
    top_k: Annotated[int, typer.Option(min=1, help="Neurons that discover finds.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each text.")] = 20,
) -> None:
    """Explore neuron circuits: prompt, discover, ablate, amplify, sweep. help shows the commands."""
    import nsp
    from nsp.cli.repl_session import Session

    note(f"loading {model}")
    loaded = nsp.load(model, device=device, dtype=dtype)
    session = Session(loaded, max_new_tokens=max_new_tokens, top_k=top_k, method=method)
    note(f"{loaded!r}\nhelp shows the commands, quit (or Ctrl-D) ends")
    _converse(session, _terminal(session) if sys.stdin.isatty() else (line.rstrip("\n") for line in sys.stdin))


def _converse(session: Session, lines: Iterable[str]) -> None:
    """Answer line after line until the session or the input ends."""
    console = stdout()
    for line in lines:
        try:
            reply = session.handle(line)
        except KeyboardInterrupt:
            note("interrupted")
            continue
        if reply.done:
            return
        if reply.error:
            note(f"error: {reply.error}")
        elif reply.summary is not None:
            render_summary(console, reply.summary)


def _terminal(session: Session) -> Iterator[str]:
    """Lines typed at a terminal, with history and completion; Ctrl-C gives a new line, Ctrl-D ends."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
        from prompt_toolkit.document import Document
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    except ImportError:
        raise InputError("the REPL needs prompt_toolkit: pip install 'nsp[repl]'") from None

    class Words(Completer):
        """The session's own completions; files after save and load."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            command, space, rest = text.partition(" ")
            if space and command in ("save", "load"):
                yield from PathCompleter(expanduser=True).get_completions(Document(rest, len(rest)), complete_event)
                return
            last = text.rpartition(" ")[2]
            for word in session.completions(text):
                yield Completion(word, -len(last))

    place = _history()
    history: History = InMemoryHistory() if place is None else FileHistory(str(place))
    typed: Any = PromptSession(history=history, completer=Words(), auto_suggest=AutoSuggestFromHistory())
    while True:
        try:
            yield typed.prompt(PROMPT)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _history() -> Path | None:
    """Where lines typed are kept; None where that folder cannot be written."""
    import platformdirs

    folder = Path(platformdirs.user_data_dir("nsp", appauthor=False))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / "repl_history"
        place.touch()
    except OSError:
        return None
    return place if os.access(place, os.W_OK) else None
