"""A whole shard of an uncompressed array, laid out with one copy of its values at most, and none where rows are long.

zarr copies each chunk several times on its way into a shard, which costs more than all the rest of writing recorded
activations. What is made here follows zarr's sharding codec (version 1.0 of its specification): the inner chunks, each
followed by its CRC32C, then the index (offset and length of each chunk, little-endian) and the index's own CRC32C.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ShardingCodecIndexLocation

from nsp.stores.disk import Part

_ABSENT = 2**64 - 1
# Rows shorter than this are gathered into one block first: a write of its own for each would cost more.
_LEAST_ROW = 16_384


def shard_parts(array: zarr.Array[Any], values: np.ndarray[Any, Any]) -> list[Part] | None:
    """What the file of one shard of `array` holds, part after part, or None where its codecs are zarr's to run.

    Args:
        array: an array of shards of plain little-endian numbers with checksums.
        values: the shard's values from its first cell on; fewer than a shard holds where the array ends before it.
    """
    codecs = array.metadata.codecs
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec) or not _plain(codecs[0]):
        return None
    inner = codecs[0].chunk_shape
    counts = [size // chunk for size, chunk in zip(array.shards or (), inner, strict=True)]
    index = np.full((*counts, 2), _ABSENT, dtype="<u8")
    stored = np.dtype(array.dtype).newbyteorder("<")
    parts: list[Part] = []
    offset = 0
    for cell in np.ndindex(*counts):
        region = tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(cell, inner, strict=True))
        block = values[region]
        if block.size == 0:
            continue  # after the array's end
        if block.shape != inner:
            whole = np.full(inner, array.fill_value, dtype=stored)
            whole[tuple(map(slice, block.shape))] = block
            block = whole
        check = 0
        for row in _rows(block.astype(stored, copy=False)):
            parts.append(row.data)
            check = google_crc32c.extend(check, row)
        parts.append(check.to_bytes(4, "little"))
        length = block.nbytes + 4
        index[cell] = offset, length
        offset += length
    last = index.tobytes()
    return [*parts, last, google_crc32c.value(last).to_bytes(4, "little")]


def _plain(codec: ShardingCodec) -> bool:
    """Whether chunks and index are little-endian bytes with a checksum, and the index stands at the end."""
    return (
        sys.byteorder == "little"
        and codec.index_location == ShardingCodecIndexLocation.end
        and _bytes_and_check(codec.codecs)
        and _bytes_and_check(codec.index_codecs)
    )


def _bytes_and_check(codecs: Sequence[Any]) -> bool:
    if len(codecs) != 2 or not isinstance(codecs[0], BytesCodec) or not isinstance(codecs[1], Crc32cCodec):
        return False
    endian = codecs[0].endian
    return endian is None or endian.value == "little"


def _rows(block: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The block's bytes as contiguous one-axis arrays, in order."""
    if block.flags.c_contiguous:
        yield block.reshape(-1).view(np.uint8)
    elif block.ndim == 1 or block[0].nbytes < _LEAST_ROW:
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    else:
        for row in block:
            yield from _rows(row)
