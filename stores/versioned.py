"""A run as an icechunk repository: one commit a unit, a tag when it is finished.

`icechunk://path` is a local repository, `icechunk+s3://bucket/prefix` one on S3 (credentials and region from the
environment, or from `storage_options`). On a local disk a repository is created in a temporary directory and renamed,
and commits are made under a file lock, because neither is safe there otherwise; on S3 icechunk needs neither.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zarr.core.buffer import cpu, default_buffer_prototype

from nsp.errors import InputError
from nsp.stores import disk, locks
from nsp.stores.backend import ROOT_KEY, call, list_keys
from nsp.stores.disk import Part

BRANCH = "main"
MANIFEST_SPLIT = 32
"""Shards along each dim that share a manifest: a commit rewrites the manifests it touches, so they are kept small."""


class IcechunkBackend:
    """An icechunk repository."""

    separator = "/"  # icechunk knows chunks by their indices and gives this form back
    versioned = True

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        try:
            import icechunk
        except ImportError as error:
            raise InputError(f'{url}: icechunk is not installed here; pip install "nsp[icechunk]"') from error
        if "ICECHUNK_LOG" not in os.environ:
            # It warns, at every opening, that local commits need a lock; they have one here.
            icechunk.set_logs_filter("warn,icechunk::storage::object_store=error")
        self._icechunk = icechunk
        self._opened: Any = None
        self.location = url.rstrip("/")
        self.options = dict(storage_options or {})
        scheme, _, rest = self.location.partition("://")
        self.path = Path(rest) if scheme == "icechunk" else None
        if self.path is None and scheme != "icechunk+s3":
            raise InputError(f"{url}: icechunk stores are icechunk://path or icechunk+s3://bucket/prefix")

    def exists(self) -> bool:
        """Whether a repository with a run is there, or anything else on a local path."""
        if self.path is not None:
            return self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()))
        return bool(self._icechunk.Repository.exists(self._storage())) and self.get(ROOT_KEY) is not None

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A temporary directory on this machine."""
        with tempfile.TemporaryDirectory(prefix="nsp-") as directory:
            yield Path(directory)

    def publish(self, built: Path, *, replace: bool) -> None:
        """Commit the template: locally in a repository that is then renamed, on S3 in place."""
        self._opened = None
        if self.path is None:
            if self.exists() and not replace:
                raise FileExistsError(self.location)
            self._fill(self._icechunk.Repository.open_or_create(self._storage(), config=self._config()), built)
            return
        parent = self.path.absolute().parent
        with (
            disk.explain_disk(self.location, "creating the store"),
            locks.held_directory(parent, self.path.name) as made,
        ):
            repository = made / "repository"
            storage = self._icechunk.local_filesystem_storage(str(repository))
            self._fill(self._icechunk.Repository.create(storage, config=self._config()), built)
            disk.sync_tree(repository)
            if self.exists():
                if not replace:
                    raise FileExistsError(self.location)
                if not self._icechunk.Repository.exists(self._storage()):
                    raise InputError(f"{self.location} is not an icechunk repository, so --force does not replace it")
                disk.remove_tree(self.path)
            try:
                os.rename(repository, self.path)
            except OSError as error:
                if self.exists():
                    raise FileExistsError(self.location) from error
                raise
            disk.sync_directories([parent])

    def open_store(self) -> Any:
        """The branch's newest commit as a zarr store."""
        return self._repository().readonly_session(BRANCH).store

    def get(self, key: str) -> bytes | None:
        """One object of the newest commit."""
        if self._opened is None and not self._icechunk.Repository.exists(self._storage()):
            return None
        data = call(self.open_store().get, key, default_buffer_prototype())
        return None if data is None else bytes(data.to_bytes())

    def names(self, prefix: str) -> set[str]:
        """Keys under the array."""
        return list_keys(self.open_store(), prefix)

    @contextmanager
    def transaction(self, message: str) -> Iterator[IcechunkTransaction]:
        """A session, committed at the end; commits of other writers meanwhile are built upon."""
        with disk.explain_disk(self.location, message):
            session = self._repository().writable_session(BRANCH)
            yield IcechunkTransaction(session.store)
            if session.has_uncommitted_changes:
                with self.wait_lock("commit") if self.path is not None else nullcontext():
                    session.commit(message, rebase_with=self._icechunk.ConflictDetector())

    def lock(self, name: str) -> AbstractContextManager[bool]:
        """A lock file on this machine."""
        return locks.try_lock(self._lock_directory(), name)

    def wait_lock(self, name: str) -> AbstractContextManager[None]:
        """A lock file on this machine."""
        return locks.wait_lock(self._lock_directory(), name)

    def finish(self, label: str) -> None:
        """Tag the newest commit, and drop the history that led to it with the manifests that only it needs."""
        repository = self._repository()
        snapshot = repository.lookup_branch(BRANCH)
        tags = repository.list_tags()
        if any(repository.lookup_tag(tag) == snapshot for tag in tags):
            return
        repository.create_tag(f"complete-{len(tags) + 1}-{re.sub('[^0-9A-Za-z]', '', label)[:16]}", snapshot)
        now = datetime.now(UTC)
        repository.expire_snapshots(older_than=now)
        repository.garbage_collect(now)

    def _fill(self, repository: Any, built: Path) -> None:
        session = repository.writable_session(BRANCH)
        call(session.store.clear)
        # Parents before children: a node's metadata must be there before its chunks.
        paths = sorted(path for path in built.rglob("*") if path.is_file())
        for path in sorted(paths, key=lambda path: (path.name != ROOT_KEY, len(path.parts))):
            call(session.store.set, path.relative_to(built).as_posix(), cpu.Buffer.from_bytes(path.read_bytes()))
        session.commit("create the run")

    def _repository(self) -> Any:
        if self._opened is None:
            if not self._icechunk.Repository.exists(self._storage()):
                raise InputError(f"{self.location}: there is no icechunk repository")
            self._opened = self._icechunk.Repository.open(self._storage())
        return self._opened

    def _storage(self) -> Any:
        if self.path is not None:
            return self._icechunk.local_filesystem_storage(str(self.path))
        parts = urlsplit(self.location)
        options = dict(self.options)
        endpoint = options.get("endpoint_url") or os.environ.get(
            "AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL")
        )
        if endpoint:
            options |= {
                "endpoint_url": endpoint,
                "allow_http": endpoint.startswith("http://"),
                "force_path_style": True,
            }
        if "access_key_id" not in options:
            options.setdefault("from_env", True)
        options.setdefault("region", os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1")))
        return self._icechunk.s3_storage(bucket=parts.netloc, prefix=parts.path.strip("/") or None, **options)

    def _config(self) -> Any:
        ice = self._icechunk
        splitting = ice.ManifestSplittingConfig.from_dict(
            {ice.ManifestSplitCondition.AnyArray(): {ice.ManifestSplitDimCondition.Any(): MANIFEST_SPLIT}}
        )
        return ice.RepositoryConfig(manifest=ice.ManifestConfig(splitting=splitting))

    def _lock_directory(self) -> Path:
        local = str(self.path.resolve()) if self.path is not None else self.location
        return locks.shared_lock_directory(local)


class IcechunkTransaction:
    """Writes to a session; its commit makes all of them durable and visible at once."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def flush(self, keys: Sequence[str]) -> None:
        """The commit does it."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete chunks in this session."""
        for key in keys:
            call(self.store.delete, key)

    def put(self, key: str, *parts: Part) -> None:
        """Set one object in this session."""
        call(self.store.set, key, cpu.Buffer.from_bytes(b"".join(parts)))
