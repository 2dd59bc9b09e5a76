"""A run under an fsspec URL (`s3://bucket/prefix`, `memory://name`): objects that replace one another atomically.

There is no rename: a template is uploaded with its root last, and nothing opens before that. Writers on one machine
keep each other out by local locks; writers on several machines need icechunk, or units that are theirs alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from zarr.storage import FsspecStore

from nsp.errors import InputError, NspError
from nsp.stores import locks
from nsp.stores.backend import ROOT_KEY

CREATING = "nsp-creating"
"""An object that stands while a template is uploaded: what is beside it may be cleared away."""


class FsspecBackend:
    """A prefix of an object store, through fsspec. `storage_options` are passed to it."""

    separator = "."
    versioned = False

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.location = url.rstrip("/")
        # Without the cache of listings: another process may have written since.
        self.options = {"use_listings_cache": False} | dict(storage_options or {})
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.location, **self.options)
        except (ImportError, ValueError) as error:
            scheme = url.partition("://")[0]
            extra = ' (pip install "nsp[s3]")' if scheme == "s3" else ""
            raise InputError(f"{url}: no access to {scheme}:// here: {error}{extra}") from error

    def exists(self) -> bool:
        """Whether any object is under the prefix, other than what a killed creation left."""
        with self._explain("looking"):
            return bool(self.fs.exists(self.path_of(ROOT_KEY)) or (self._occupied() and not self._abandoned()))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A temporary directory on this machine."""
        with tempfile.TemporaryDirectory(prefix="nsp-") as directory:
            yield Path(directory)

    def publish(self, built: Path, *, replace: bool) -> None:
        """Upload everything, the root's metadata last."""
        with self.wait_lock("create"), self._explain("creating the store"):
            if self.exists():
                if not replace:
                    raise FileExistsError(self.location)
                if not self.fs.exists(self.path_of(ROOT_KEY)):
                    raise InputError(f"{self.location} holds something that is not a run of nsp; choose another place")
                self.fs.rm_file(self.path_of(ROOT_KEY))
                self.fs.rm(self.root, recursive=True)
            elif self._occupied():
                self.fs.rm(self.root, recursive=True)
            self.fs.pipe_file(self.path_of(CREATING), b"a template is being uploaded")
            for path in sorted(path for path in built.rglob("*") if path.is_file()):
                key = path.relative_to(built).as_posix()
                if key != ROOT_KEY:
                    self.fs.pipe_file(self.path_of(key), path.read_bytes())
            self.fs.rm_file(self.path_of(CREATING))
            self.fs.pipe_file(self.path_of(ROOT_KEY), (built / ROOT_KEY).read_bytes())

    def open_store(self) -> Any:
        """The prefix as a zarr store."""
        return FsspecStore.from_url(self.location, storage_options=self.options, read_only=True)

    def get(self, key: str) -> bytes | None:
        """One object."""
        with self._explain("reading"):
            try:
                data: bytes = self.fs.cat_file(self.path_of(key))
            except FileNotFoundError:
                return None
            return data

    def names(self, prefix: str) -> set[str]:
        """Objects under the array's prefix."""
        try:
            return {str(name).rstrip("/").rpartition("/")[2] for name in self.fs.ls(self.path_of(prefix), detail=False)}
        except FileNotFoundError:
            return set()

    @contextmanager
    def transaction(self, message: str) -> Iterator[FsspecTransaction]:
        """Plain writes in order: each object is durable when its upload returns."""
        with self._explain(message):
            yield FsspecTransaction(self)

    def lock(self, name: str) -> AbstractContextManager[bool]:
        """A lock file on this machine."""
        return locks.try_lock(locks.shared_lock_directory(self.location), name)

    def wait_lock(self, name: str) -> AbstractContextManager[None]:
        """A lock file on this machine."""
        return locks.wait_lock(locks.shared_lock_directory(self.location), name)

    def finish(self, label: str) -> None:
        """Nothing is left behind."""

    def path_of(self, key: str) -> str:
        """The file system's path of `key`."""
        return f"{self.root.rstrip('/')}/{key}"

    def _occupied(self) -> bool:
        try:
            return bool(self.fs.ls(self.root, detail=False))
        except FileNotFoundError:
            return False

    def _abandoned(self) -> bool:
        return bool(self.fs.exists(self.path_of(CREATING)))

    @contextmanager
    def _explain(self, doing: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except (PermissionError, ConnectionError, TimeoutError) as error:
            raise NspError(
                f"{self.location}: {doing} failed: {error}. What is committed is intact; run it again"
            ) from error


class FsspecTransaction:
    """Writes to an object store."""

    def __init__(self, backend: FsspecBackend) -> None:
        self._backend = backend
        self.store = FsspecStore.from_url(backend.location, storage_options=backend.options, read_only=False)

    def flush(self, keys: Sequence[str]) -> None:
        """Uploads are durable when they return."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects."""
        for key in keys:
            try:
                self._backend.fs.rm_file(self._backend.path_of(key))
            except FileNotFoundError:
                continue

    def put(self, key: str, data: bytes) -> None:
        """Replace one object."""
        self._backend.fs.pipe_file(self._backend.path_of(key), data)
