"""The command line. `main` is the console script `nsp`; the commands are one module each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from nsp.cli import backends, check, doctor, plot, recipes, repl, report, rerun, run, show, stores
from nsp.cli.console import EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, RunInterruptedError, note, report_error
from nsp.cli.data import app as data_app
from nsp.cli.models import app as models_app
from nsp.errors import NspError

app = typer.Typer(
    name="nsp",
    help="Which internal part of a language model caused this output?",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("recipes")(recipes.recipes)
app.command("schema")(recipes.schema)
app.command("show")(show.show)
app.command("plot")(plot.plot)
app.command("report")(report.report)
app.command("rerun")(rerun.rerun)
app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("repl")(repl.repl)
app.command("status")(backends.status)
app.command("jobs")(backends.jobs)
stores.register(app)
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"nsp {version('nsp')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print nsp's version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere on the line.")
    ] = False,
) -> None:
    """Which internal part of a language model caused this output?"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Exit codes: 0, 1 (a run failed), 2 (bad input), 130 (interrupted)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # To look for plugins, pydantic reads what every installed package says of itself: a fifth of the time that a typo in a
    # recipe takes to be told.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        code = app(args=words, prog_name="nsp", standalone_mode=False)
    except NspError as error:
        return report_error(error, debug=debug)
    except RunInterruptedError as error:
        note(str(error))
        return EXIT_INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left; keep the interpreter from complaining about it on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        # typer's usage errors; it brings its own copy of click in some versions, so they are known by what they can do.
        if hasattr(error, "format_message"):
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "nsp"
            note(f"error: {error.format_message()}\nTry '{command} --help'.")
            return EXIT_INPUT
        return report_error(error, debug=debug)
    if code == EXIT_INTERRUPTED:  # typer itself may turn Ctrl-C into this code
        note("interrupted; finished work is kept")
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
