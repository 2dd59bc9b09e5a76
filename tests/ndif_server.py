"""Starting the protocol double (`ndif_double.py`) as a process, and a tiny checkpoint for it to serve."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_models as tiny
import httpx

from nsp.engine.runtime import Runtime


@dataclass
class Double:
    """A running double: its address, its process, and where it was started."""

    address: str
    process: subprocess.Popen[bytes]
    folder: Path
    key: str = ""

    def fault(self, kind: str, times: int = 1) -> None:
        """Let it misbehave (see `ndif_double.FAULTS`)."""
        httpx.post(f"{self.address}/fault", json={"kind": kind, "times": times}).raise_for_status()

    def seen(self) -> list[dict[str, Any]]:
        """The requests that came in."""
        found: list[dict[str, Any]] = httpx.get(f"{self.address}/seen").json()
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def again(self) -> Double:
        """The same server started once more, at the same address."""
        return start_double(self.folder, self.key, int(self.address.rsplit(":", 1)[1]))


def start_double(folder: Path, key: str = "", port: int = 0) -> Double:
    """A double whose working directory is ``folder``; it has no nsp."""
    place = folder / "address"
    place.unlink(missing_ok=True)
    script = Path(__file__).with_name("ndif_double.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NDIF")}
    with open(folder / "double.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(place), key, str(port)],
            cwd=folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    for _ in range(1200):
        if place.exists():
            return Double(place.read_text(), process, folder, key)
        assert process.poll() is None, (folder / "double.log").read_text()
        time.sleep(0.05)
    raise AssertionError("the double did not start")


def without_self_check(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Take every model for checked: the engine's self-check is a dozen jobs for each one that is loaded.

    The traces of test_backends.py have it made.
    """
    init = Runtime.__init__

    def checked(self: Any, *given: Any, **named: Any) -> None:
        init(self, *given, **named)
        self.branch_checked = True

    set_attribute(Runtime, "__init__", checked)


def checkpoint(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A tiny model and its tokenizer as a checkpoint directory."""
    tiny.module(family, **options).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
