"""A finished run as one zip file: read in place, never written to."""

from __future__ import annotations

import os
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from zarr.storage import ZipStore

from nsp.errors import InputError, NspError
from nsp.stores import disk
from nsp.stores.backend import ROOT_KEY, Transaction, call

CLAIMS = "claims"


class ZipBackend:
    """A zip archive made by `pack`. Every writing method raises InputError."""

    separator = "."
    versioned = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.exists()

    def open_store(self) -> Any:
        """The archive as a zarr store."""
        self._open().close()
        return call(ZipStore.open, self.path, mode="r", read_only=True)

    def get(self, key: str) -> bytes | None:
        """One member."""
        if not self.exists():
            return None
        with self._open() as archive:
            try:
                return archive.read(key)
            except KeyError:
                return None

    def names(self, prefix: str) -> set[str]:
        """Members under `prefix`."""
        head = prefix.strip("/") + "/"
        with self._open() as archive:
            return {name.removeprefix(head) for name in archive.namelist() if name.startswith(head)}

    def staging(self) -> AbstractContextManager[Path]:
        """InputError."""
        self._refuse()

    def publish(self, built: Path, *, replace: bool) -> None:
        """InputError."""
        self._refuse()

    def transaction(self, message: str) -> AbstractContextManager[Transaction]:
        """InputError."""
        self._refuse()

    def lock(self, name: str) -> AbstractContextManager[bool]:
        """InputError."""
        self._refuse()

    def wait_lock(self, name: str) -> AbstractContextManager[None]:
        """InputError."""
        self._refuse()

    def finish(self, label: str) -> None:
        """InputError."""
        self._refuse()

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise NspError(
                f"{self.location} is not a run of nsp: it cannot be opened as a zip archive ({error})"
            ) from error

    def _refuse(self) -> NoReturn:
        raise InputError(
            f"{self.location} is a zip archive, which can be read but not written: unzip it into a directory "
            "(`unzip RUN.zip -d RUN.zarr`) and use that, or name another place with --out"
        )


def pack(source: Path, target: Path) -> None:
    """Write the run in the directory `source` into a new zip file `target`, in one step.

    Members are stored, not compressed again: chunks are compressed already.
    """
    temporary = target.with_name(f".{target.name}.partial")
    with disk.explain_disk(str(target), "packing the archive"):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(temporary, "w", compression=zipfile.ZIP_STORED) as archive:
                # The header first: it is found at once, and by people who list the archive.
                for path in sorted(_members(source), key=lambda path: (path.name != ROOT_KEY, str(path))):
                    archive.write(path, path.relative_to(source).as_posix())
            disk.sync_file(temporary)
            os.replace(temporary, target)
            disk.sync_directories([target.absolute().parent])
        finally:
            temporary.unlink(missing_ok=True)


def _members(source: Path) -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name != CLAIMS]
        found += [Path(folder, name) for name in files if not name.endswith((".partial", ".lock"))]
    return found
