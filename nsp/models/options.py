"""Load options: from what a user writes to what torch and transformers take, checked before anything is fetched."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from nsp.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
Quantization = Literal["4bit", "8bit"]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to load on. None: cuda if there is one, else mps, else cpu."""
    import torch

    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is not known. Give cpu, cuda, cuda:<index> or mps.") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise InputError(f"device {device!r}: torch sees no CUDA device here. Leave device out, or give cpu.")
        if chosen.index is not None and chosen.index >= count:
            raise InputError(f"device {device!r}: torch sees {count} CUDA device(s), cuda:0 to cuda:{count - 1}.")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps': torch sees none here. Leave device out, or give cpu.")
    return chosen


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype to load in; None stands for the checkpoint's own ("auto").

    Default: float32 on cpu, where half precision is slow and coarse, and the checkpoint's own elsewhere.
    """
    import torch

    if dtype is None:
        return torch.float32 if device.type == "cpu" else None
    if isinstance(dtype, torch.dtype):
        name = str(dtype)
    elif isinstance(dtype, str):
        name = dtype
    else:
        raise InputError(f"dtype is a name or a torch.dtype, not {type(dtype).__name__}.")
    name = name.strip().removeprefix("torch.")
    if name == "auto":
        return None
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not one to load weights in. Give {', '.join(DTYPES)} or auto.")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def quantization_config(quantization: str | None, dtype: torch.dtype | None) -> Any:
    """transformers' bitsandbytes config for "4bit" (nf4) or "8bit"; None for None. `dtype` is used to compute in."""
    if quantization is None:
        return None
    if quantization not in ("4bit", "8bit"):
        raise InputError(f"quantization {quantization!r} is not known. Give 4bit, 8bit, or leave it out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"quantization {quantization!r} needs the package bitsandbytes, which is not installed "
            "(pip install bitsandbytes). Or load with dtype='bfloat16'."
        )
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.bfloat16
    )
