"""Find zarr nodes whose metadata cannot be read, and a store without them, so that the rest still opens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore


def damaged_nodes(store: Any) -> dict[str, str]:
    """Path -> what is wrong, of every group and array below the root whose `zarr.json` is missing or damaged."""
    found: dict[str, str] = sync(_scan(store, ""))
    return found


def hide(store: Any, paths: Iterable[str]) -> Any:
    """`store` as if the nodes at `paths` did not exist."""
    return _Hiding(store, frozenset(paths))


async def _scan(store: Any, path: str) -> dict[str, str]:
    # A name with a dot in front is no node: another writer may be about to rename it.
    names = [name async for name in store.list_dir(path) if name != "zarr.json" and not name.startswith(".")]
    found = await asyncio.gather(*(_scan_child(store, f"{path}/{name}".strip("/")) for name in names))
    return {node: what for part in found for node, what in part.items()}


async def _scan_child(store: Any, path: str) -> dict[str, str]:
    data = await store.get(f"{path}/zarr.json", default_buffer_prototype())
    if data is None:
        return {path: "it has no zarr.json"}
    try:
        kind = json.loads(data.to_bytes())["node_type"]
    except (ValueError, KeyError, TypeError) as error:
        return {path: f"zarr.json: {error}"}
    return await _scan(store, path) if kind == "group" else {}


class _Hiding(WrapperStore[Any]):  # type: ignore[misc]  # zarr is not followed by mypy
    def __init__(self, store: Any, paths: frozenset[str] = frozenset()) -> None:
        super().__init__(store)
        self._hidden = paths

    def _with_store(self, store: Any) -> _Hiding:
        return _Hiding(store, self._hidden)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for name in self._store.list_dir(prefix):
            if f"{prefix}/{name}".strip("/") not in self._hidden:
                yield name
