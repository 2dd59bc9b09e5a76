"""GGUF files: converted once to a safetensors directory in the cache, keyed by the file's SHA-256.

transformers reads the file (names, the permuted query and key weights, the vocabulary) and widens quantised weights to
float32, exactly. nsp accounts for the rest: every weight of the model was there, and every tensor and key of the file is
used or refused by name (`nsp.models.gguf_metadata`, `nsp.models.gguf_tokenizer`). The result is kept.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from nsp.errors import InputError, NspError
from nsp.models.cache import cache_dir, publish_directory, require_space
from nsp.models.checkpoint import problem
from nsp.models.gguf_metadata import Metadata, check_keys, check_rotary, check_tensors, read_metadata, rope_parameters
from nsp.models.gguf_tokenizer import apply_tokenizer_keys, check_kept
from nsp.models.hashing import file_sha256
from nsp.models.progress import quiet_transformers, step

MANIFEST = "nsp-conversion.json"
_FORMAT = 2  # part of the key: raise it when the same GGUF would have to be converted anew
_MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Raise InputError unless `path` is a file that begins as every GGUF does."""
    if not path.is_file():
        raise InputError(f"there is no file {path}. Give the path of a .gguf file.")
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise InputError(f"{path} is not a GGUF file (it does not begin with 'GGUF'). Was the download complete?")


def converted_directory(sha256: str) -> Path:
    """Where the conversion of the GGUF with this hash lies, whether or not it is there."""
    return cache_dir() / "gguf" / f"{sha256}-{_FORMAT}"


def is_converted(directory: Path) -> bool:
    """Whether `directory` is a conversion whose files have the sizes that were written."""
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def convert(path: Path, *, sha256: str | None = None) -> Path:
    """The safetensors directory for the GGUF at `path`, converting it if this cache has not done so yet.

    `sha256`: the file's hash where it is known already. Raises InputError for a file that is damaged, of an
    architecture that transformers cannot read, or short of weights.
    """
    check_gguf(path)
    target = converted_directory(sha256 or file_sha256(path))
    return publish_directory(lambda staging: _build(path, staging), target, valid=is_converted)


def _build(path: Path, staging: Path) -> None:
    from transformers import AutoTokenizer

    with step(f"Converting {path.name} to safetensors (once)"):
        module, tokenizer, metadata = _read(path)
        size = sum(value.numel() * value.element_size() for value in module.parameters())
        require_space(staging, size, f"the conversion of {path.name}")
        # A model read from GGUF counts as quantised, and such models refuse to be saved; its weights are float32.
        module.hf_quantizer = None
        if hasattr(module.config, "quantization_config"):
            del module.config.quantization_config
        # transformers writes the GGUF's own title here; in a cache it would only mislead.
        module.config._name_or_path = ""
        with quiet_transformers():
            module.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            check_kept(tokenizer, AutoTokenizer.from_pretrained(staging), metadata)
    if trouble := problem(staging):
        raise NspError(f"the conversion of {path.name} is not whole: {trouble}")
    _write_manifest(path, staging)


def _read(path: Path) -> tuple[Any, Any, Metadata]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    try:
        # tqdm's bar for this step has no switch of its own: it writes to whatever sys.stderr is.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            metadata = read_metadata(path)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            config = AutoConfig.from_pretrained(folder, gguf_file=name)
            if (rotary := rope_parameters(metadata, config)) is not None:
                config.rope_parameters = rotary
            module, report = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, config=config, dtype=torch.float32, output_loading_info=True
            )
    except InputError:
        raise
    except Exception as error:  # the readers raise whatever a damaged byte happens to break
        raise InputError(
            f"{path} cannot be read as a GGUF model: {_first_line(error)}. The file may be damaged or incomplete, or "
            "its architecture unknown to transformers; a Hugging Face directory of the same model would work."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{path} lacks {len(missing)} of the model's weights, the first is {missing[0]}. "
            "A GGUF split into parts must be merged into one file first (llama-gguf-split --merge)."
        )
    _check_shapes(path, module)
    check_keys(metadata, module.config)
    check_tensors(metadata, _used_tensors(metadata, module))
    check_rotary(metadata, module)
    apply_tokenizer_keys(metadata, tokenizer)
    return module, tokenizer, metadata


def _check_shapes(path: Path, module: Any) -> None:
    """InputError where the file's weights have other shapes than its keys say: transformers takes them as they are."""
    import torch

    with torch.device("meta"), quiet_transformers():
        wanted = {name: value.shape for name, value in type(module)(module.config).state_dict().items()}
    for name, value in module.state_dict().items():
        if name in wanted and value.shape != wanted[name]:
            raise InputError(
                f"{path}: weights have other shapes than its keys say; {name} is {tuple(value.shape)}, not {tuple(wanted[name])}"
            )


def _used_tensors(metadata: Metadata, module: Any) -> set[str]:
    """The tensors of the file that transformers puts into the model, by the names that it has for them."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(metadata.architecture, TensorProcessor)(config=module.config.to_dict())
    return {*get_gguf_hf_weights_map(module, processor), "output.weight"}


def _write_manifest(path: Path, staging: Path) -> None:
    import torch
    import transformers

    files = {file.name: file.stat().st_size for file in sorted(staging.iterdir())}
    manifest = {
        "gguf": path.name,
        "format": _FORMAT,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "files": files,
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
