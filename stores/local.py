"""A run as one local directory: published by rename, committed by fsync and markers, claimed by file locks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from zarr.storage import LocalStore

from nsp.errors import InputError
from nsp.stores import disk, locks
from nsp.stores.backend import ROOT_KEY
from nsp.stores.disk import Part


class LocalBackend:
    """A directory. Several processes of one machine may write to it, each to its own units."""

    separator = "."  # all chunks of an array in one directory: one directory to sync
    versioned = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self._claims: Path | None = None

    def exists(self) -> bool:
        """Whether a file or a directory that is not empty is there."""
        if self.path.is_dir():
            return any(self.path.iterdir())
        return os.path.lexists(self.path)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory beside the run's, on the same file system; what killed processes left there is cleared away."""
        parent = self.path.absolute().parent
        with (
            disk.explain_disk(self.location, "creating the store"),
            locks.held_directory(parent, self.path.name) as made,
        ):
            built = made / "store"
            built.mkdir()
            yield built

    def publish(self, built: Path, *, replace: bool) -> None:
        """Rename `built` to the run's path."""
        with disk.explain_disk(self.location, "creating the store"):
            disk.sync_tree(built)
            aside = self.path.with_name(f".{self.path.name}.replaced")
            if replace and self.exists():
                _refuse_foreign(self.path)
                # Two renames, and only then is the old run removed: a kill leaves one of the two whole.
                disk.remove_tree(aside)
                os.rename(self.path, aside)
            try:
                os.rename(built, self.path)
            except (FileExistsError, NotADirectoryError) as error:
                raise FileExistsError(self.location) from error
            except OSError as error:
                if self.exists():  # ENOTEMPTY: somebody else was quicker
                    raise FileExistsError(self.location) from error
                raise
            disk.sync_directories([self.path.absolute().parent])
            if replace:
                disk.remove_tree(aside)

    def open_store(self) -> Any:
        """The directory as a zarr store."""
        return LocalStore(self.path, read_only=True)

    def get(self, key: str) -> bytes | None:
        """The contents of one file."""
        try:
            return (self.path / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, prefix: str) -> set[str]:
        """Names in the array's directory."""
        try:
            return set(os.listdir(self.path / prefix))
        except (FileNotFoundError, NotADirectoryError):
            return set()

    @contextmanager
    def transaction(self, message: str) -> Iterator[LocalTransaction]:
        """Plain writes in order: the markers make them a transaction, not the file system."""
        with disk.explain_disk(self.location, message):
            yield LocalTransaction(self.path)

    def lock(self, name: str) -> AbstractContextManager[bool]:
        """A lock file in the store."""
        return locks.try_lock(self._claim_directory(), name)

    def wait_lock(self, name: str) -> AbstractContextManager[None]:
        """A lock file in the store."""
        return locks.wait_lock(self._claim_directory(), name)

    def finish(self, label: str) -> None:
        """Delete what killed writers left half written."""
        for left in self.path.rglob("*.partial"):
            with suppress(OSError):
                left.unlink()

    def _claim_directory(self) -> Path:
        # Inside the directory of the first marker array: zarr looks for members in groups, never in arrays,
        # so plain readers do not stumble over it.
        if self._claims is None:
            marker = min(self.path.glob("*/done"), default=None) or min(self.path.glob("*/*/done"), default=None)
            self._claims = (marker or locks.shared_lock_directory(str(self.path.resolve()))) / "claims"
        return self._claims


class LocalTransaction:
    """Writes to a directory, made durable file by file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = LocalStore(path)

    def flush(self, keys: Sequence[str]) -> None:
        """fsync the files, then their directories."""
        paths = [self.path / key for key in keys]
        for path in paths:
            disk.sync_file(path)
        disk.sync_directories(path.parent for path in paths)

    def delete(self, keys: Sequence[str]) -> None:
        """Unlink the files, then sync their directories."""
        paths = [self.path / key for key in keys]
        present = [path for path in paths if path.exists()]
        for path in present:
            path.unlink(missing_ok=True)
        disk.sync_directories(path.parent for path in present)

    def put(self, key: str, *parts: Part) -> None:
        """Write beside, sync, rename."""
        disk.replace_file(self.path / key, *parts)


def is_run(path: Path) -> bool:
    """Whether the directory holds a run of nsp, judged by its header alone."""
    try:
        attributes = json.loads((path / ROOT_KEY).read_bytes())["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(attributes, dict) and "nsp_schema" in attributes


def _refuse_foreign(path: Path) -> None:
    damaged = (path / ROOT_KEY).exists() and path.suffix == ".zarr"
    if not is_run(path) and not damaged:
        raise InputError(f"{path} is not a run of nsp, so --force does not replace it; choose another place with --out")
