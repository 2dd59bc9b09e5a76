"""Every family's site table under the conformance list, on tiny random models; and tables broken on purpose, which the list must find."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from nsp.cli.app import main
from nsp.conformance import Report, check
from nsp.conformance_lines import LINES
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.model import Model, load
from nsp.models.catalogue import CATALOGUE
from nsp.models.families import GEMMA2, GPT2, GPT_NEOX, GPTJ, LLAMA, MIXTRAL, PHI3, QWEN3, TABLES
from nsp.models.family_docs import BEGIN, END, families_table
from nsp.models.geometry import describe_model
from nsp.models.tables import SiteTable, Where
from tests.tiny_architectures import CASES, HIDDEN, WINDOW, tiny_from, tiny_model

ROOT = Path(__file__).parents[1]
REQUIRED = """gpt2 gpt_neo gpt_neox gptj opt bloom falcon llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text
phi phi3 olmo2 stablelm starcoder2 cohere granite smollm3 gpt_oss mamba jamba""".split()

# Lines that say nothing about a family, and so must be the only ones that are left out.
NO_BRANCH = {"branch path = plain path", "generation without intervention is transformers' own"}
LEFT_OUT: Mapping[str, set[str]] = {
    "gpt_neo": {*NO_BRANCH, "sdpa = eager attention", "each unit"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(before)
