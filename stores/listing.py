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
    """One run: its path or URL, and its header, or what is wrong with it."""

    path: Path | str
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

    `directory` may be an fsspec URL (`s3://bucket/prefix`). Directories and zip archives are found; what is no run of nsp
    is passed over, a run whose header is damaged is listed as such. Raises InputError if there is no such directory.
    """
    text = os.fspath(directory)
    if "://" in text:
        return sorted(_find_at(text), key=lambda run: str(run.path))
    root = Path(directory)
    if not root.exists():
        raise InputError(f"there is no directory {root}")
    return sorted(_find(root, DEPTH), key=lambda run: Path(run.path))


def _find_at(url: str) -> Iterator[Listed]:
    """Runs under a URL: directories are walked level by level, then all headers are read in one batch."""
    if url.startswith("icechunk"):
        raise InputError(f"{url}: an icechunk repository is one run; nsp show {url} shows it")
    from glob import has_magic

    from nsp.stores.remote import FsspecBackend

    backend = FsspecBackend(url)
    keys: list[str] = []
    level = [backend.root]
    with backend.explain("listing"):
        if not backend.fs.exists(backend.root):
            raise InputError(f"there is nothing under {url}")
        for _ in range(DEPTH + 1):
            entries = {path: backend.fs.ls(path, detail=True) for path in level}
            roots = {path for path, found in entries.items() if any(_name(one) == ROOT_KEY for one in found)}
            keys += [f"{path.rstrip('/')}/{ROOT_KEY}" for path in roots]
            below = [one for path, found in entries.items() if path not in roots for one in found]
            level = [one["name"] for one in below if one["type"] == "directory" and one["name"] not in entries]
        # One batch; but names with brackets or stars would be taken for patterns in it.
        plain = [key for key in keys if not has_magic(key)]
        headers = backend.fs.cat(plain, on_error="omit") if plain else {}
        headers |= {key: backend.fs.cat_file(key) for key in keys if has_magic(key)}
    for key, data in headers.items():
        # As the user wrote it: what a file system makes of its own paths differs between protocols.
        below = key.lstrip("/").removeprefix(backend.root.strip("/"))
        yield from _parse(backend.location + below.removesuffix(f"/{ROOT_KEY}"), data)


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


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


def _parse(path: Path | str, data: bytes) -> Iterator[Listed]:
    try:
        attributes = json.loads(data)["attributes"]
    except (ValueError, KeyError, TypeError):
        yield Listed(path, {}, "damaged header")
        return
    if isinstance(attributes, dict) and "nsp_schema" in attributes:
        yield Listed(path, attributes)
