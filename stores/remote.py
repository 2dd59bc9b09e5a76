"""A run under an fsspec URL (`s3://bucket/prefix`, `memory://name`): objects that replace one another atomically.

There is no rename: a template is uploaded with its root last, and nothing opens before that. Writers on one machine
keep each other out by local locks; writers on several machines need icechunk, or units that are theirs alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from zarr.storage import FsspecStore, WrapperStore

from nsp.errors import InputError, NspError
from nsp.stores import locks
from nsp.stores.backend import ROOT_KEY
from nsp.stores.disk import Part

CREATING = "nsp-creating"
"""An object that stands while a template is uploaded: what is beside it may be cleared away."""


class FsspecBackend:
    """A prefix of an object store, through fsspec. `storage_options` are passed to it."""

    separator = "."
    versioned = False

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.location = url.rstrip("/")
        self._known: dict[str, Any] = {}
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
        with self.explain("looking"):
            return bool(self.fs.exists(self.path_of(ROOT_KEY)) or (self._occupied() and not self._abandoned()))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A temporary directory on this machine."""
        with tempfile.TemporaryDirectory(prefix="nsp-") as directory:
            yield Path(directory)

    def publish(self, built: Path, *, replace: bool) -> None:
        """Upload everything, the root's metadata last."""
        with self.wait_lock("create"), self.explain("creating the store"):
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
            files = {path.relative_to(built).as_posix(): path for path in built.rglob("*") if path.is_file()}
            root = files.pop(ROOT_KEY)
            self.fs.pipe({self.path_of(key): path.read_bytes() for key, path in files.items()})
            self.fs.rm_file(self.path_of(CREATING))
            self.fs.pipe_file(self.path_of(ROOT_KEY), root.read_bytes())
            self._known.clear()

    def open_store(self) -> Any:
        """The prefix as a zarr store."""
        return self.zarr_store(read_only=True)

    def get(self, key: str) -> bytes | None:
        """One object."""
        with self.explain("reading"):
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
        with self.explain(message):
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

    def zarr_store(self, *, read_only: bool) -> Any:
        """The prefix as a zarr store, with what this backend already knows of it."""
        store = FsspecStore.from_url(self.location, storage_options=self.options, read_only=read_only)
        return _Remembering(store, self._known)

    def _occupied(self) -> bool:
        try:
            return bool(self.fs.ls(self.root, detail=False))
        except FileNotFoundError:
            return False

    def _abandoned(self) -> bool:
        return bool(self.fs.exists(self.path_of(CREATING)))

    @contextmanager
    def explain(self, doing: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except (PermissionError, ConnectionError, TimeoutError) as error:
            raise NspError(
                f"{self.location}: {doing} failed: {error}. What is committed is intact; run it again"
            ) from error


class _Remembering(WrapperStore[Any]):  # type: ignore[misc]  # zarr is not followed by mypy
    """A store that asks once for what never changes after creation: nodes' metadata, and which nodes a group has."""

    def __init__(self, store: Any, known: dict[str, Any]) -> None:
        super().__init__(store)
        self._known = known

    def _with_store(self, store: Any) -> _Remembering:
        return _Remembering(store, self._known)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        if not key.endswith("/zarr.json"):  # the root's own changes with the run's state
            return await self._store.get(key, prototype, byte_range)
        if key not in self._known:
            self._known[key] = await self._store.get(key, prototype, byte_range)
        return self._known[key]

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        if f"{prefix}/" not in self._known:
            self._known[f"{prefix}/"] = [name async for name in self._store.list_dir(prefix)]
        for name in self._known[f"{prefix}/"]:
            yield name


class FsspecTransaction:
    """Writes to an object store."""

    def __init__(self, backend: FsspecBackend) -> None:
        self._backend = backend
        self.store = backend.zarr_store(read_only=False)

    def flush(self, keys: Sequence[str]) -> None:
        """Uploads are durable when they return."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects."""
        for key in keys:
            try:
                self._backend.fs.rm_file(self._backend.path_of(key))
            except FileNotFoundError:
                continue

    def put(self, key: str, *parts: Part) -> None:
        """Replace one object."""
        self._backend.fs.pipe_file(self._backend.path_of(key), b"".join(parts))
