"""Fixtures that several test modules share. The model is smollm2 in float32 on the CPU, where its figures are known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import nsp
from nsp.models.smollm2 import fetch_smollm2

# A Python that a test starts in the repository must import the installed nsp, not the bare folder nsp/ that lies there.
os.environ["PYTHONSAFEPATH"] = "1"

# Workers of pytest-xdist, and the processes that tests start, share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    _SHARE = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(min(torch.get_num_threads(), _SHARE))
    os.environ.setdefault("OMP_NUM_THREADS", str(_SHARE))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of smollm2, byte-level BPE with a chat template."""
    return AutoTokenizer.from_pretrained(fetch_smollm2())


@pytest.fixture(scope="session")
def smollm2() -> nsp.Model:
    """The default model, loaded once; tests leave it as it is."""
    return nsp.load("smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def ioi_pair() -> nsp.Pair:
    """Two prompts of 14 tokens that differ in token 9."""
    return nsp.pair(
        clean="When Mary and John went to the store, John gave a drink to",
        corrupt="When Mary and John went to the store, Mary gave a drink to",
        answer=" Mary",
        distractor=" John",
    )


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that speaks NDIF's protocol, in a process of its own (`ndif_server.Double`)."""
    from ndif_server import start_double

    started = start_double(tmp_path_factory.mktemp("double"))
    yield started
    started.stop()
