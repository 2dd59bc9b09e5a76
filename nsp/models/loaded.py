"""A loaded model, and the record of where it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsp.models.checkpoint import weight_files
from nsp.models.hashing import files_sha256, module_sha256, tokenizer_fingerprint, tokenizer_sha256, weights_fingerprint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Origin:
    """Where weights lie before they are loaded.

    `source` is `catalogue:<alias>`, `hub:<owner>/<name>`, `directory`, `gguf` or `module`; `revision` the hub's commit
    (or the package version for smollm2). `weights_hash` is set where it is already known, `hub_id` where there is one.
    """

    name: str
    source: str
    directory: Path | None = None
    revision: str | None = None
    hub_id: str | None = None
    weights_hash: str | None = None


@dataclass(frozen=True)
class Provenance:
    """What a stored result says about its model. Hashes are hex SHA-256; no machine paths.

    `weights_hash`: of the weight file (for several shards, of their `name sha256` lines; for a GGUF, of the GGUF
    itself; for a torch module, of its state dict). `tokenizer_hash` is '' where there is no tokenizer.
    """

    name: str
    source: str
    revision: str | None
    weights_hash: str
    tokenizer_hash: str
    dtype: str
    device: str
    quantization: str | None
    attn_implementation: str | None


@dataclass(eq=False)
class LoadedModel:
    """A model ready for use: `module` in eval mode with `requires_grad` False, its tokenizer (None if a module came
    without one: prompts must then be token ids), and its provenance."""

    name: str
    module: torch.nn.Module
    tokenizer: Any
    origin: Origin
    quantization: str | None = field(default=None)
    place: str | None = field(default=None)  # the backend that has the weights, where they are not here

    @property
    def config(self) -> Any:
        """The transformers config; None for a module that has none."""
        return getattr(self.module, "config", None)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        import torch

        return next((value.device for value in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        import torch

        kinds = (value.dtype for value in self.module.parameters() if value.dtype.is_floating_point)
        return next(kinds, torch.float32)

    @property
    def attn_implementation(self) -> str | None:
        return getattr(self.config, "_attn_implementation", None)

    def __post_init__(self) -> None:
        self._as_loaded = weights_fingerprint(self.module)
        self._hashes: dict[Any, str] = {}

    @property
    def provenance(self) -> Provenance:
        """What the model is now: weights or a tokenizer that were edited after loading have another hash.

        Hashing takes seconds for large weights; it is done when first asked for, and again only after an edit.
        """
        return Provenance(
            name=self.name,
            source=self.origin.source,
            revision=self.origin.revision,
            weights_hash=self._kept(weights_fingerprint(self.module), self._weights_hash),
            tokenizer_hash=self._kept(tokenizer_fingerprint(self.tokenizer), lambda: tokenizer_sha256(self.tokenizer)),
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.place or str(self.device),
            quantization=self.quantization,
            attn_implementation=self.attn_implementation,
        )

    def _kept(self, fingerprint: Any, compute: Callable[[], str]) -> str:
        if fingerprint not in self._hashes:
            self._hashes[fingerprint] = compute()
        return self._hashes[fingerprint]

    def _weights_hash(self) -> str:
        if weights_fingerprint(self.module) != self._as_loaded:
            return module_sha256(self.module)
        if self.origin.weights_hash is not None:
            return self.origin.weights_hash
        if self.origin.directory is not None:
            return files_sha256(weight_files(self.origin.directory))
        return module_sha256(self.module)

    def __repr__(self) -> str:
        kind = type(self.module).__name__
        dtype = self.quantization or str(self.dtype).removeprefix("torch.")
        return f"LoadedModel({self.name!r}, {kind}, {dtype}, {self.device})"
