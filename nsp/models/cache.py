"""nsp's cache directory, and the one way in which anything is put there.

A directory is built beside its final place and renamed into it when complete, so a name that exists is whole. A
process that is killed leaves only a hidden `.partial-*` sibling, which nothing reads and the next build sweeps away.
A file lock lets two processes share one build.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nsp.errors import NspError
from nsp.models.progress import step


def cache_dir() -> Path:
    """`$NSP_CACHE`, or the platform's cache directory for nsp. Not created here."""
    chosen = os.environ.get("NSP_CACHE", "").strip()
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("nsp", appauthor=False))


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock that belongs to `target`, waiting for any other process that holds it. Parents are created."""
    from filelock import FileLock, Timeout

    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with step(f"Another process is preparing {target.name}; waiting for it"):
                lock.acquire()
    try:
        yield
    finally:
        lock.release()


def publish_directory(
    build: Callable[[Path], None], target: Path, *, valid: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """Make `target` by calling `build` on an empty staging directory beside it, and return `target`.

    Nothing runs where `target` exists and `valid(target)` holds. An existing target that is not valid is replaced.
    Whatever goes wrong inside `build` (also Ctrl-C), the staging directory is removed and the error passes on.
    """
    if target.is_dir() and valid(target):
        return target
    with locked(target):
        if target.is_dir() and valid(target):
            return target  # another process was quicker
        _sweep(target)
        staging = _sibling(target)
        with storage_errors(target):
            try:
                staging.mkdir()
                build(staging)
                _sync_tree(staging)
                if target.is_dir():
                    os.rename(target, _sibling(target))
                os.rename(staging, target)
                _sync(target.parent)
            finally:
                _sweep(target)
    return target


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one clear message; other errors pass unchanged."""
    full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    refused = {
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.EROFS: "the file system is read-only",
        errno.ENOTDIR: "a file stands where a directory is needed",
        errno.EEXIST: "a file stands where a directory is needed",
    }
    try:
        yield
    except OSError as error:
        # Only what concerns the target: a build may also be refused elsewhere, at a file it reads.
        ours = error.filename is None or str(error.filename).startswith(str(target.parent))
        reason = full.get(error.errno or 0) or (refused.get(error.errno or 0) if ours else None)
        if reason is None:
            raise
        raise NspError(
            f"cannot write {target}: {reason}. Free space there, or set NSP_CACHE to a directory that can be written."
        ) from error


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raise NspError where the disk of `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise NspError(
            f"{what} needs {needed / 1e9:.1f} GB in {directory.parent} and {free / 1e9:.1f} GB are free. "
            "Free space there, or set NSP_CACHE to a larger disk."
        )


def _sibling(target: Path) -> Path:
    return target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"


def _sweep(target: Path) -> None:
    """Remove what dead builds of `target` left behind. Only under the lock: no live build can own any of it."""
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync_tree(root: Path) -> None:
    for path in sorted(root.rglob("*")):
        if not path.is_symlink():
            _sync(path)
    _sync(root)


def _sync(path: Path) -> None:
    # Some systems cannot open a directory or sync it; the rename is still atomic there.
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
