"""SHA-256 of weights and tokenizers: what a result needs to say which model it came from.

Hashes of files are remembered in `hashes.json` in the cache directory, keyed by path, size and modification time,
so that gigabytes are read once and not at each load.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.errors import NspError
from nsp.models.cache import cache_dir, locked
from nsp.models.progress import step

if TYPE_CHECKING:
    import torch

_WORTH_A_SPINNER = 200_000_000  # bytes; about half a second


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, remembered until its size or modification time changes."""
    path = path.resolve()
    stat = path.stat()
    key = str(path)
    known = _read_memory().get(key)
    if isinstance(known, list) and known[:2] == [stat.st_size, stat.st_mtime_ns]:
        return str(known[2])
    digest = hash_file(path)
    _remember(key, [stat.st_size, stat.st_mtime_ns, digest])
    return digest


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file, read now and not remembered."""
    spinner = step(f"Checking {path.name}") if path.stat().st_size > _WORTH_A_SPINNER else nullcontext()
    with spinner, path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path]) -> str:
    """One hash for a checkpoint: the file's own for one file, else the hash of `name sha256` lines in name order."""
    if len(paths) == 1:
        return file_sha256(paths[0])
    lines = "".join(f"{path.name} {file_sha256(path)}\n" for path in sorted(paths, key=lambda path: path.name))
    return hashlib.sha256(lines.encode()).hexdigest()


def module_sha256(module: torch.nn.Module) -> str:
    """Hash of a module's state: name, dtype, shape and bytes of every parameter and saved buffer, in name order."""
    import torch

    total = hashlib.sha256()
    state = module.state_dict()
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in state.values()):
        # accelerate has put some of the weights elsewhere; it knows how to bring them here one after the other.
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(module)
    for name, value in sorted(state.items()):
        if not isinstance(value, torch.Tensor):
            continue  # extra state of a layer; no weight
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # Reading as bytes works for every dtype, also those that numpy does not have.
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


# Of each tensor, so many values in equal steps tell whether it was changed behind torch's back.
_SAMPLED = 512


def weights_fingerprint(module: torch.nn.Module) -> tuple[Any, ...]:
    """What tells cheaply whether a module's weights were edited: a few milliseconds, and no hash of their values.

    Of each parameter and saved buffer: which tensor it is, torch's count of the changes made in place, and the sum of a
    sample of its bytes, since a change through ``parameter.data`` is not counted.
    """
    import torch

    facts: list[Any] = []
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            continue
        sample = 0
        if not value.is_meta and value.is_contiguous() and value.numel():
            flat = value.detach().view(-1)
            chosen = flat[:: max(1, len(flat) // _SAMPLED)]
            sample = int(chosen.contiguous().view(torch.uint8).sum(dtype=torch.int64))
        facts.append((name, id(value), value._version, sample))
    return tuple(facts)


def tokenizer_fingerprint(tokenizer: Any) -> tuple[Any, ...]:
    """What tells cheaply whether a tokenizer was changed: its vocabulary's size, special tokens, template, and ends."""
    if tokenizer is None:
        return ("no tokenizer",)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [str(getattr(backend, part, None)) for part in ("normalizer", "pre_tokenizer", "post_processor")]
    special = str(getattr(tokenizer, "special_tokens_map", None))
    return ("tokenizer", id(tokenizer), len(tokenizer), special, str(getattr(tokenizer, "chat_template", None)), *parts)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what turns text into ids: the fast tokenizer's own description (or the vocabulary), and the chat
    template. An absent tokenizer hashes to ''."""
    if tokenizer is None:
        return ""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        description = fast.to_str()
    else:
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
        description = json.dumps([type(tokenizer).__name__, vocabulary], sort_keys=True)
    extras = {
        "special": getattr(tokenizer, "special_tokens_map", {}),
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    return hashlib.sha256((description + json.dumps(extras, sort_keys=True, default=str)).encode()).hexdigest()


def _memory_path() -> Path:
    return cache_dir() / "hashes.json"


def _read_memory() -> dict[str, Any]:
    try:
        content = json.loads(_memory_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # absent or damaged: hash again
    return content if isinstance(content, dict) else {}


def _remember(key: str, value: list[Any]) -> None:
    # A cache that cannot be written costs time, not correctness.
    with suppress(OSError, NspError), locked(_memory_path()):
        memory = {path: known for path, known in _read_memory().items() if os.path.exists(path)}
        memory[key] = value
        handle, temporary = tempfile.mkstemp(dir=cache_dir(), prefix=".hashes-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(memory, file, indent=0)
        os.replace(temporary, _memory_path())
