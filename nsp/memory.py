"""Sizes of memory as people write them."""

from __future__ import annotations

import math
import re

from nsp.errors import InputError

_SIZE = re.compile(r"\s*(\d+\.?\d*(?:e\+?\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_memory(size: str | float) -> int:
    """The bytes of a size: ``4GB`` or ``4G`` (powers of 1000), ``500MiB`` (powers of 1024), ``1e9``, or a number of bytes.

    Raises InputError where it is none, or less than a byte.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is not None:
        count = float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " ")
    elif isinstance(size, int | float) and not isinstance(size, bool):
        count = size
    else:
        count = 0
    if not 1 <= count < math.inf:
        raise InputError(f"{size!r} is no size of memory; write 4GB, 500MiB, 1e9 or another number of bytes")
    return int(count)
