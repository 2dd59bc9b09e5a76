"""The number formats that a run may be stored in.

zarr has no bfloat16: such values are kept as float32 whose low 16 bits are zero (`source_dtype` says so), which
compress to the size of 16 bits. float16 holds nothing above 65504: a value that would overflow stops the run.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from nsp.errors import InputError, NspError
from nsp.stores.names import is_text, text_values

StoreDtype = Literal["float32", "float16", "bfloat16"]
STORE_DTYPES: tuple[str, ...] = get_args(StoreDtype)
CONVERTED_GROUPS = ("activations", "effects", "attribution", "circuit")
"""Groups whose floats `store_dtype` applies to; the few numbers of the others stay as they are."""


def check_store_dtype(name: str | None) -> None:
    """InputError for a name that is not one of `STORE_DTYPES`."""
    if name is not None and name not in STORE_DTYPES:
        raise InputError(f"store dtype {name!r} is not one of {', '.join(STORE_DTYPES)}")


def stored_dtype(
    group: str, dtype: np.dtype[Any], store_dtype: str | None, encoding: Mapping[Hashable, Any] | None = None
) -> tuple[np.dtype[Any], dict[str, str]]:
    """The dtype on disk of a variable that units fill, and the attributes that tell a reader what was done.

    A variable whose xarray ``encoding`` names a dtype keeps that one, since its numbers fit no smaller one.
    """
    if encoding and "dtype" in encoding:
        return np.dtype(encoding["dtype"]), {}
    converted = group.partition("/")[0] in CONVERTED_GROUPS and dtype.kind == "f"
    if store_dtype is None or not converted:
        return dtype, {}
    kept = np.dtype("float16" if store_dtype == "float16" else "float32")
    return kept, {"store_dtype": store_dtype} | ({"source_dtype": "bfloat16"} if store_dtype == "bfloat16" else {})


def fill_of(dtype: np.dtype[Any]) -> float | int | str:
    """What a cell holds that no unit has written: NaN for floats, -1 for integers, no text for texts."""
    if is_text(dtype):
        return ""
    return float("nan") if dtype.kind == "f" else -1


def encode(
    where: str, values: np.ndarray[Any, Any], dtype: np.dtype[Any], store_dtype: str | None
) -> np.ndarray[Any, Any]:
    """`values` as they go to disk; NspError where they do not fit."""
    if is_text(dtype) or is_text(values.dtype):
        if is_text(dtype) != is_text(values.dtype):
            raise NspError(f"{where}: {values.dtype} values given for a variable of {dtype}")
        return text_values(values)
    if values.dtype == dtype and store_dtype != "bfloat16":
        return np.ascontiguousarray(values)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values, dtype=dtype)
        if dtype.itemsize < values.dtype.itemsize or values.dtype.kind != "f":
            lost = np.isfinite(values) & ~np.isfinite(stored)
            if lost.any():
                largest = np.abs(values[lost]).max()
                raise NspError(
                    f"{where}: {int(lost.sum())} values do not fit {dtype} (largest {largest:.6g}, limit "
                    f"{np.finfo(dtype).max:.6g}); run again with --store-dtype bfloat16 or float32"
                )
        return round_to_bfloat16(stored) if store_dtype == "bfloat16" else stored
    if values.dtype.kind not in "iub":
        raise NspError(f"{where}: {values.dtype} values given for a variable of {dtype}")
    stored = np.ascontiguousarray(values, dtype=dtype)
    if not np.array_equal(stored, values):
        raise NspError(f"{where}: values between {values.min()} and {values.max()} do not fit {dtype}")
    return stored


def round_to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 values rounded to the nearest bfloat16, ties to even; NaN and infinity stay."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(values), rounded, values).astype(np.float32)
