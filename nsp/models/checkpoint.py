"""What a directory of weights must hold before anybody tries to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from nsp.errors import InputError

# In the order of preference: safetensors are never passed over for pickled weights.
_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


def weight_names(directory: Path, listing: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the weight files this checkpoint consists of, whether or not they are here yet.

    An index file in `directory` names its shards; else the single file that is in `directory` or in `listing` (the
    names in the repository). Empty where there is neither.
    """
    available = set(listing)
    for index, single in _LAYOUTS:
        if (directory / index).is_file():
            return _shards(directory / index)
        if single in available or (directory / single).is_file():
            return (single,)
    return ()


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The weight files of a whole checkpoint."""
    return tuple(directory / name for name in weight_names(directory))


def problem(directory: Path) -> str | None:
    """What stops `directory` from being a whole checkpoint, in words; None if nothing does."""
    if not (directory / "config.json").is_file():
        hint = ""
        if (directory / "adapter_config.json").is_file():
            hint = " It holds an adapter: merge it into its base model and save that."
        elif gguf := sorted(path.name for path in directory.glob("*.gguf")):
            hint = f" It holds {gguf[0]}: give that file's path instead."
        return f"it has no config.json.{hint}"
    names = weight_names(directory)
    if not names:
        return "it has no weights (model.safetensors, or model.safetensors.index.json with its shards)."
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        return f"{len(missing)} of its {len(names)} weight files are missing, the first is {missing[0]}."
    return None


def has_safetensors(directory: Path) -> bool:
    return any(name.endswith(".safetensors") for name in weight_names(directory))


def _shards(index: Path) -> tuple[str, ...]:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is not a weight index that can be read: {error!r}") from error
    return tuple(sorted(str(name) for name in shards))
