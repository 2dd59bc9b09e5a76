"""A model without its weights: configuration and tokenizer here, the weights on a server."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from nsp.backends.options import BackendOptions
from nsp.errors import InputError, NspError
from nsp.models.catalogue import find
from nsp.models.loaded import LoadedModel, Origin
from nsp.models.locate import locate
from nsp.models.options import resolve_dtype
from nsp.models.progress import quiet_transformers


def load_remote_model(
    source: str | Path,
    options: BackendOptions,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The outline of ``source``, its module on torch's ``meta`` device.

    Of a hub model only the configuration and the tokenizer are fetched. ``dtype`` is what the server's numbers are
    taken for; by default the configuration's own. ``weights_hash`` of the provenance says where the weights are:
    ``remote:<name>@<revision>``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    origin = _origin(source, revision)
    place = str(origin.directory or origin.hub_id)
    chosen = resolve_dtype(dtype, torch.device("meta"))
    how: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if origin.directory is None:
        how["revision"] = origin.revision
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = AutoConfig.from_pretrained(place, **how)
            reader = tokenizer
            if tokenizer is None or isinstance(tokenizer, str | Path):
                reader = AutoTokenizer.from_pretrained(place if tokenizer is None else str(tokenizer), **how)
        except Exception as error:  # hub and file errors of many kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NspError(f"the configuration and the tokenizer of {origin.name} cannot be read: {first}") from error
        kind = chosen or getattr(config, "dtype", None) or torch.float32
        extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        # The model keeps this name and it travels with jobs: a path of this machine has no place there.
        config._name_or_path = origin.hub_id or origin.name
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=trust_remote_code, **extra)
    module.eval().requires_grad_(False)
    remote = options.server_name(str(source)) or origin.hub_id or origin.name
    known = Origin(
        origin.name, origin.source, origin.directory, origin.revision, origin.hub_id,
        f"remote:{remote}@{origin.revision or 'main'}",
    )  # fmt: skip
    return LoadedModel(origin.name, module, reader, known, place=options.kind)


def server_name(loaded: LoadedModel, source: str | Path, options: BackendOptions) -> tuple[str, str | None]:
    """The name and the revision by which the server is asked for a model, which ``source`` is here."""
    origin = loaded.origin
    stated = options.server_name(str(source))
    if stated is not None:
        name, _, revision = stated.partition("@")
        return name, revision or None
    if origin.hub_id is not None:
        return origin.hub_id, origin.revision
    raise InputError(
        f"{loaded.name} is no hub model, so the server must be told its name for it: backend: {{kind: ndif, model: NAME}} "
        f"(or models: {{{loaded.name}: NAME}} in a recipe of two models), or nsp.load(..., backend={{'kind': 'ndif', 'model': 'NAME'}})"
    )


def _origin(source: str | Path, revision: str | None) -> Origin:
    text = str(source)
    name, _, written = text.partition("@")
    entry = find(name)
    if entry is not None and entry.on_hub:
        return Origin(
            entry.alias, f"catalogue:{entry.alias}", None, revision or written or entry.revision, entry.hub_id
        )
    if entry is None and "/" in name and not text.startswith((".", "~", "/")) and not Path(text).is_dir():
        return Origin(name, f"hub:{name}", None, revision or written or None, name)
    return locate(source, revision)
