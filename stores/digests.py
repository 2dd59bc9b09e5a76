"""SHA-256 of decoded values: the same whatever chunks, codec or backend hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nsp.stores.names import is_text


def digest(values: np.ndarray[Any, Any]) -> str:
    """Hex SHA-256 of an array's dtype, shape and values (little-endian, C order; texts as length-prefixed UTF-8)."""
    found = hashlib.sha256()
    if is_text(values.dtype):
        found.update(f"text{values.shape}".encode())
        for text in values.ravel():
            data = str(text).encode("utf-8", "backslashreplace")
            found.update(len(data).to_bytes(8, "little") + data)
        return found.hexdigest()
    plain = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    found.update(f"{plain.dtype.str}{values.shape}".encode())
    found.update(plain.data if plain.size else b"")
    return found.hexdigest()


def join(digests: Mapping[str, str]) -> str:
    """Several variables' digests as one text: `logit_diff=ab12… prob=90fe…`."""
    return " ".join(f"{name}={value}" for name, value in sorted(digests.items()))


def split(text: str) -> dict[str, str]:
    """The inverse of `join`."""
    return dict(part.split("=", 1) for part in text.split())
