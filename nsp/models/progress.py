"""Signs of life for long steps: on stderr, and only where a person is watching a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def step(message: str) -> Iterator[None]:
    """Show `message` with a spinner while the block runs; nothing at all where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    # The file is fixed here, so that a block which redirects sys.stderr does not swallow the spinner.
    with Console(file=sys.stderr).status(message):
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and loading report; nsp checks what the report would have said."""
    from huggingface_hub import utils
    from transformers.utils import logging

    hub: Any = utils  # its type stubs do not list the bar switches
    verbosity = logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if not hub_bars:  # transformers' switch moves the hub's as well
                hub.disable_progress_bars()


@contextmanager
def download_bars() -> Iterator[None]:
    """Let huggingface_hub draw its byte counters, but only on a terminal."""
    from huggingface_hub import utils

    hub: Any = utils
    if sys.stderr.isatty() or hub.are_progress_bars_disabled():
        yield
        return
    hub.disable_progress_bars()
    try:
        yield
    finally:
        hub.enable_progress_bars()
