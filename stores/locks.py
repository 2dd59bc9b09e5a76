"""Locks between processes that the kernel frees when their holder dies, however it dies."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nsp.stores.disk import explain_disk

STAGING = ".creating-"


@contextmanager
def try_lock(directory: Path, name: str) -> Iterator[bool]:
    """Hold `directory/name.lock`; yields False at once where another live holder has it."""
    try:
        with explain_disk(str(directory), "locking it"):
            lock = _file_lock(directory, name)
            lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def wait_lock(directory: Path, name: str) -> Iterator[None]:
    """Hold `directory/name.lock`, waiting for it."""
    with explain_disk(str(directory), "locking it"):
        lock = _file_lock(directory, name)
        lock.acquire(poll_interval=0.01)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def held_directory(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden directory in `parent` in which to prepare `name`; it is gone when the block ends.

    What killed processes left of theirs is cleared away first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(parent, name)
    made = parent / f".{name}{STAGING}{uuid.uuid4().hex}"
    # Locked before it exists, so that nobody takes it for abandoned.
    with try_lock(parent, made.name):
        made.mkdir()
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
            (parent / f"{made.name}.lock").unlink(missing_ok=True)


def _clear_abandoned(parent: Path, name: str) -> None:
    for made in parent.glob(f".{glob.escape(name)}{STAGING}*/"):
        with try_lock(parent, made.name) as dead:
            if dead:
                shutil.rmtree(made, ignore_errors=True)
                (parent / f"{made.name}.lock").unlink(missing_ok=True)
    for doomed in parent.glob(f".{glob.escape(name)}.*.removed/"):
        shutil.rmtree(doomed, ignore_errors=True)


def shared_lock_directory(location: str) -> Path:
    """Where this machine's processes lock a store that is not on its disk.

    It keeps writers on one machine apart, not writers on several.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"nsp-locks-{user}" / hashlib.sha256(location.encode()).hexdigest()[:32]


def _file_lock(directory: Path, name: str) -> FileLock:
    directory.mkdir(parents=True, exist_ok=True)
    # Not thread-local and not a singleton: two writers in one process, in threads or not, keep each other out.
    return FileLock(directory / f"{name}.lock", thread_local=False)
