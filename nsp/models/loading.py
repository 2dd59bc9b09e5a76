"""`load_weights`: any of the accepted sources to a module that is ready for use, with its tokenizer.

What is checked here, because it would otherwise show as odd results much later: no weight may be missing from the
checkpoint (transformers would fill it with random numbers), options are possible before anything is fetched, and
pickled weights are read only where there are no safetensors.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.errors import InputError, NspError
from nsp.models.checkpoint import has_safetensors
from nsp.models.loaded import LoadedModel, Origin
from nsp.models.locate import locate
from nsp.models.options import quantization_config, resolve_device, resolve_dtype
from nsp.models.progress import quiet_transformers, step

if TYPE_CHECKING:
    import torch


def load_weights(
    source: str | Path | torch.nn.Module,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model in eval mode with `requires_grad` False.

    source: catalogue alias, hub id (`owner/name` or `owner/name@revision`), directory, `.gguf` file, or a torch
        module. A module is used as it is, not copied: it is set to eval mode, its parameters stop requiring
        gradients, and `device` and `dtype`, if given, move it.
    tokenizer: a tokenizer, or a directory or hub id to read one from; default: the one beside the weights. A module
        without one takes prompts only as token ids.
    revision: branch, tag or commit; for hub models only.
    device: default cuda, else mps, else cpu.
    dtype: float32, bfloat16, float16, float64, auto (the checkpoint's own) or a torch.dtype; default float32 on cpu
        and auto elsewhere.
    quantization: 4bit or 8bit, with bitsandbytes installed.
    attn_implementation: eager, sdpa, flash_attention_2, ...; default: transformers' choice.

    Raises InputError for what cannot be meant or read, NspError for what cannot be had (network, access, memory).
    """
    import torch

    if isinstance(source, torch.nn.Module):
        if revision is not None or quantization is not None:
            raise InputError("revision and quantization are for weights still to be loaded, not for a built module.")
        return _adopt(source, tokenizer, device, dtype, attn_implementation)
    if not isinstance(source, str | Path):
        raise InputError(f"a model is a name, a path or a torch module, not {type(source).__name__}.")
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    quantized = quantization_config(quantization, chosen_dtype)
    origin = locate(source, revision, code=trust_remote_code)
    with step(f"Loading {origin.name}"), quiet_transformers():
        reader = _tokenizer(origin, tokenizer, trust_remote_code)
        module = _module(origin, chosen_device, chosen_dtype, quantized, attn_implementation, trust_remote_code)
    return LoadedModel(origin.name, _still(module), reader, origin, quantization)


def _adopt(
    module: torch.nn.Module,
    tokenizer: Any,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
) -> LoadedModel:
    if device is not None:
        module.to(resolve_device(device))
    if dtype is not None:
        first = next(module.parameters(), None)
        if first is not None and (wanted := resolve_dtype(dtype, first.device)) is not None:
            module.to(wanted)
    if attn_implementation is not None:
        switch: Any = getattr(module, "set_attn_implementation", None)
        if switch is None:
            raise InputError(f"attn_implementation needs a transformers model; {type(module).__name__} is not one.")
        try:
            switch(attn_implementation)
        except (ValueError, ImportError) as error:
            raise InputError(f"attn_implementation {attn_implementation!r}: {_first_line(error)}") from error
    name = type(module).__name__
    origin = Origin(name, "module")
    if isinstance(tokenizer, str | Path):
        tokenizer = _tokenizer(origin, tokenizer, trust_remote_code=False)
    return LoadedModel(name, _still(module), tokenizer, origin)


def _still(module: torch.nn.Module) -> torch.nn.Module:
    return module.eval().requires_grad_(False)


def _tokenizer(origin: Origin, given: Any, trust_remote_code: bool) -> Any:
    if given is not None and not isinstance(given, str | Path):
        return given
    from transformers import AutoTokenizer

    place = str(given if given is not None else origin.directory)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise bare Exception for damaged files
        raise InputError(
            f"no tokenizer can be read for {origin.name} from {place}: {_first_line(error)}. "
            "Give one: tokenizer=<a tokenizer, a directory or a hub id>."
        ) from error


def _module(
    origin: Origin,
    device: torch.device,
    dtype: torch.dtype | None,
    quantized: Any,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> torch.nn.Module:
    import torch

    directory = origin.directory
    assert directory is not None, "only a built module has no directory"
    options: dict[str, Any] = {
        "dtype": "auto" if dtype is None else dtype,
        "use_safetensors": has_safetensors(directory),
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantized is not None:
        options["quantization_config"] = quantized
    if quantized is not None or device.type != "cpu":
        options["device_map"] = {"": device}  # straight to the device, without a copy in main memory first
    try:
        module, report = _model_class(directory, trust_remote_code).from_pretrained(str(directory), **options)
    except torch.OutOfMemoryError as error:
        raise NspError(
            f"{origin.name} does not fit in the memory of {device}. Try dtype='bfloat16', quantization='8bit' or "
            "'4bit', device='cpu', or a smaller model."
        ) from error
    except NspError:
        raise
    except Exception as error:  # config, weights and remote code each raise their own kinds
        raise _unloadable(origin, error, attn_implementation) from error
    _check_complete(origin, report)
    # A path of this machine has no place in a config that may be stored or sent; the origin knows it.
    module.config._name_or_path = origin.hub_id or origin.name
    loaded: torch.nn.Module = module
    return loaded


def _model_class(directory: Path, trust_remote_code: bool) -> Any:
    """The auto class with this model's language-model head: masked for BERT's kind, else causal."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    config = AutoConfig.from_pretrained(str(directory), trust_remote_code=trust_remote_code)
    named = getattr(config, "architectures", None) or [""]
    return AutoModelForMaskedLM if named[0].endswith("ForMaskedLM") else AutoModelForCausalLM


def _check_complete(origin: Origin, report: dict[str, Any]) -> None:
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{origin.name} lacks {len(missing)} of its model's weights, the first is {missing[0]}: they would be "
            "random. The checkpoint is damaged, or of another model than its config.json says."
        )
    if extra := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{origin.name}: {len(extra)} weights in the checkpoint have no place in the model and are not used, "
            f"the first is {extra[0]}",
            stacklevel=4,
        )


def _unloadable(origin: Origin, error: Exception, attn_implementation: str | None) -> NspError:
    said = _first_line(error)
    if "trust_remote_code" in str(error):
        return InputError(
            f"{origin.name} runs Python code of its own. If you trust it, load with trust_remote_code=True."
        )
    if attn_implementation is not None and attn_implementation in str(error):
        return InputError(f"{origin.name} cannot use attn_implementation {attn_implementation!r}: {said}")
    if type(error).__name__ == "SafetensorError":
        return InputError(f"the weights of {origin.name} cannot be read, a file is damaged or cut short: {said}")
    return InputError(f"{origin.name} cannot be loaded by transformers: {said}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
