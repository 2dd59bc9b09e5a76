"""Durable writes on a local file system: data first, then the name, then the directory that holds it."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nsp.errors import NspError

Part = bytes | memoryview
"""A stretch of a file."""
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def sync_file(path: Path) -> None:
    """Return when the contents of `path` are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directories(paths: Iterable[Path]) -> None:
    """Return when the names in these directories are on the disk."""
    if os.name == "nt":  # Windows has no handle on a directory to sync
        return
    for path in sorted(set(paths)):
        sync_file(path)


def sync_tree(root: Path) -> None:
    """Return when everything under `root` is on the disk."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            sync_file(Path(folder, name))
        sync_directories([Path(folder)])


def replace_file(path: Path, *parts: Part) -> None:
    """Give `path` new contents, the parts one after another: a reader, now or after a crash, sees the old or the new.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directories([path.parent])


def remove_tree(path: Path) -> None:
    """Delete a directory: it leaves its name first, so that it is never seen half gone."""
    doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex}.removed")
    try:
        os.rename(path, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def explain_disk(location: str, doing: str) -> Iterator[None]:
    """Turn a full disk, a quota or a refusal of the system into a message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise NspError(
                f"{location}: no space left on the device while {doing}. What is committed is intact: "
                "free some space and run the same command again to resume."
            ) from error
        if error.errno in REFUSED:
            raise NspError(
                f"{location}: the system refused to write while {doing} ({os.strerror(error.errno)}). "
                "Choose a directory that you may write to with --out."
            ) from error
        raise
