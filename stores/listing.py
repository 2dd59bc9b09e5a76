"""Which runs lie under a directory, from their headers alone: neither xarray nor zarr is imported."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsp.errors import InputError

ROOT_KEY = "zarr.json"
DEPTH = 4
"""Levels of directories that are searched for runs."""


@dataclass(frozen=True)
class Listed:
    """One run: its path, and its header, or what is wrong with it."""

    path: Path
    header: dict[str, Any]
    problem: str = ""

    def summary(self) -> dict[str, str]:
        """state, kind, model, headline, size, units, created_at and plan, as text; ``headline`` is the main figure."""
        if self.problem:
            names = ("kind", "model", "headline", "size", "units", "created_at", "plan")
            return {"state": self.problem} | dict.fromkeys(names, "")
        model, extra = self.header.get("model"), self.header.get("extra")
        return {
            "state": str(self.header.get("state", "")),
            "kind": str(self.header.get("kind", "")),
            "model": str(model.get("name", "")) if isinstance(model, dict) else "",
            "headline": str(extra.get("headline", "")) if isinstance(extra, dict) else "",
            "size": _size(extra.get("bytes")) if isinstance(extra, dict) else "",
            "units": str(self.header.get("units", "")),
            "created_at": str(self.header.get("created_at", "")),
            "plan": str(self.header.get("plan_hash", ""))[:12],
        }


def _size(count: Any) -> str:
    return f"{count / 1e6:.1f} MB" if isinstance(count, int) else ""


def list_runs(directory: str | os.PathLike[str]) -> list[Listed]:
    """Every run under `directory` (or `directory` itself, if it is one), sorted by path.

    Directories and zip archives are found; what is no run of nsp is passed over, a run whose header is damaged is
    listed as such. Raises InputError if there is no such directory.
    """
    root = Path(directory)
    if not root.exists():
        raise InputError(f"there is no directory {root}")
    return sorted(_find(root, DEPTH), key=lambda run: run.path)


def _find(path: Path, depth: int) -> Iterator[Listed]:
    if path.is_file():
        if path.suffix == ".zip":
            yield from _zipped(path)
        return
    try:
        data = (path / ROOT_KEY).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        yield from _below(path, depth)
    except OSError as error:
        yield Listed(path, {}, f"unreadable: {error.strerror}")
    else:
        yield from _parse(path, data)


def _below(path: Path, depth: int) -> Iterator[Listed]:
    try:
        entries = list(os.scandir(path))
    except OSError:
        return
    for entry in entries:
        is_archive = entry.name.endswith(".zip") and entry.is_file()
        if not entry.name.startswith(".") and (is_archive or (depth > 0 and entry.is_dir())):
            yield from _find(path / entry.name, depth - 1)


def _zipped(path: Path) -> Iterator[Listed]:
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(ROOT_KEY)
    except (OSError, KeyError, zipfile.BadZipFile):
        return
    yield from _parse(path, data)


def _parse(path: Path, data: bytes) -> Iterator[Listed]:
    try:
        attributes = json.loads(data)["attributes"]
    except (ValueError, KeyError, TypeError):
        yield Listed(path, {}, "damaged header")
        return
    if isinstance(attributes, dict) and "nsp_schema" in attributes:
        yield Listed(path, attributes)
