"""What a place that keeps runs must offer, and which place a location names.

A backend knows how to publish a finished template in one step, to write a few keys so that they are durable before
anything after them, and to lock a name between processes. All else (schema, layout, markers) is the same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from nsp.errors import InputError
from nsp.stores.disk import Part

Location = str | os.PathLike[str]
ROOT_KEY = "zarr.json"


class Transaction(Protocol):
    """Writes that become durable, and on versioned backends visible, together."""

    @property
    def store(self) -> Any:
        """The zarr store to write arrays to."""

    def flush(self, keys: Sequence[str]) -> None:
        """Return only when `keys` are durable: what is written next is never durable before them."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete `keys`, durably; a key that does not exist is no error."""

    def put(self, key: str, *parts: Part) -> None:
        """Replace one object by its parts, one after another, atomically and durably."""


class Backend(Protocol):
    """One run's place: a directory, an archive, a prefix of an object store, a versioned repository."""

    @property
    def location(self) -> str:
        """The location as text, as a user would write it."""

    @property
    def separator(self) -> str:
        """What stands between the indices in a chunk's key."""

    @property
    def versioned(self) -> bool:
        """Whether a store, once opened, keeps showing the moment it was opened at."""

    def exists(self) -> bool:
        """Whether something is there, run or not."""

    def staging(self) -> AbstractContextManager[Path]:
        """A new local directory in which to build a template for `publish`."""

    def publish(self, built: Path, *, replace: bool) -> None:
        """Make the template under `built` the run, in one step; FileExistsError if one is there and not `replace`."""

    def open_store(self) -> Any:
        """A read-only zarr store of what is committed now."""

    def get(self, key: str) -> bytes | None:
        """One object, or None if it does not exist."""

    def names(self, prefix: str) -> set[str]:
        """Keys under the array at `prefix`, relative to it."""

    def transaction(self, message: str) -> AbstractContextManager[Transaction]:
        """A transaction; leaving it without an exception commits it."""

    def lock(self, name: str) -> AbstractContextManager[bool]:
        """A lock that dies with its process: True if held, False at once if another live process holds it."""

    def wait_lock(self, name: str) -> AbstractContextManager[None]:
        """The same lock, waiting for it."""

    def finish(self, label: str) -> None:
        """The run is complete: tidy up what only writers need, tag what can be tagged."""


def locate(location: Location, storage_options: Mapping[str, Any] | None = None) -> Backend:
    """The backend that `location` names.

    A path is a directory, or a zip archive if it names a file; `scheme://…` is an fsspec URL; `icechunk://path` and
    `icechunk+s3://bucket/prefix` are icechunk repositories.
    """
    text = os.fspath(location)
    scheme, separator, _ = text.partition("://")
    if not text.strip():
        raise InputError("a store's location is empty; give a directory, a .zip file or a URL")
    if not separator:
        return _path_backend(Path(text))
    if scheme == "icechunk" or scheme.startswith("icechunk+"):
        from nsp.stores.versioned import IcechunkBackend

        return IcechunkBackend(text, storage_options)
    from nsp.stores.remote import FsspecBackend

    return FsspecBackend(text, storage_options)


def _path_backend(path: Path) -> Backend:
    if path.suffix == ".zip" or path.is_file():
        from nsp.stores.archive import ZipBackend

        return ZipBackend(path)
    from nsp.stores.local import LocalBackend

    return LocalBackend(path)


def list_keys(store: Any, prefix: str) -> set[str]:
    """Keys of a zarr store under `prefix`, relative to it: for backends without a quicker way."""
    from zarr.core.sync import sync

    async def collect() -> set[str]:
        head = prefix.strip("/") + "/"
        return {key.removeprefix(head) async for key in store.list_prefix(head)}

    found: set[str] = sync(collect())
    return found


def call(method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run a zarr store's coroutine method from plain code."""
    from zarr.core.sync import sync

    return sync(method(*args, **options))
