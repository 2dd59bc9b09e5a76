"""The real NDIF server (``pytest -m ndif``; CONTRIBUTING says what it needs): the same numbers there and here."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from ndif_server import checkpoint
from test_backends import STATEMENTS, assert_same, run
from test_backends_kinds import CASES, recipe_of
from test_backends_kinds import folder as weights_folder  # noqa: F401  # a fixture
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import nsp
from nsp.cli.app import main
from nsp.models.smollm2 import fetch_smollm2
from nsp.stores import diff, open_run

pytestmark = [pytest.mark.ndif, pytest.mark.timeout(1800)]
SERVE, URL = os.environ.get("NSP_NDIF_SERVE"), os.environ.get("NSP_NDIF_URL")
HERE = "http://127.0.0.1:8001"


def serve(what: str) -> None:
    assert SERVE is not None
    subprocess.run([SERVE, what], check=True, timeout=1200)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    if URL is not None:
        yield URL
        return
    if SERVE is None:
        pytest.fail("set NSP_NDIF_SERVE to a script that starts a server, or NSP_NDIF_URL to a server")
    serve("start")
    yield HERE
    serve("stop")


def backend(server: str, model: Path) -> dict[str, Any]:
    return {"kind": "ndif", "host": server, "model": str(model)}


@pytest.mark.parametrize("state", STATEMENTS, ids=lambda one: one.__name__)
def test_traces(server: str, state: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "tiny"
    if not folder.exists():
        checkpoint(folder)
    there = nsp.load(folder, dtype="float32", backend=backend(server, folder))
    here = nsp.load(folder, device="cpu", dtype="float32")
    assert_same(run(there, state), run(here, state))


# What keeps each recipe's whole path and takes a minute; and for a model of two layers.
RECIPES = {
    "ioi": [],
    "steering": [],
    "neuron-circuit": ["prompts.size=1"],
    "patchscope": ["layers=all", "target_layers=all", "preset=quick", "sources.entities=[Paris, Tokyo]"],
}
TWO_LAYERS = {
    "ioi": [],
    "steering": ["vector.layers=1"],
    "neuron-circuit": ["prompts.size=1", "known=false"],
    "patchscope": ["layers=all", "target_layers=all", "sources.entities=[Paris, Tokyo]"],
}


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers that reads smollm2's tokens."""
    folder = tmp_path_factory.mktemp("two-layers")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=49152, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(fetch_smollm2()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", ["two layers", "smollm2"])
def test_recipes(server: str, size: str, recipe: str, two_layers: Path, tmp_path: Path) -> None:
    weights = two_layers if size == "two layers" else fetch_smollm2()
    options = (TWO_LAYERS if size == "two layers" else RECIPES)[recipe]
    command = ["run", recipe, "--no-progress", "--dtype", "float32"]
    command += [word for option in options for word in ("--set", option)]
    command += ["--set", f"model={weights}"] if size == "two layers" else []
    took = []
    for name, where in {"here": [], "there": ["--backend", json.dumps(backend(server, weights))]}.items():
        begin = time.monotonic()
        assert main([*command, "--out", str(tmp_path / f"{name}.zarr"), *where]) == 0
        took.append(time.monotonic() - begin)
    largest = compare(tmp_path / "here.zarr", tmp_path / "there.zarr")
    print(f"| `{recipe}` | {size} | {took[0]:.1f} | {took[1]:.1f} | {largest:.1e} |")


def compare(expected: Path, found: Path) -> float:
    """The largest difference of two stores, which is small; of a value above 1, such as a norm, relative to it.

    A rank is a count: one logit of 49 152 that rounds the other way moves it by one, and it is not part of what is returned.
    """
    compared = diff(str(expected), str(found))
    assert not compared.only_a
    assert not compared.only_b
    largest = 0.0
    for variable in compared.variables:
        if variable.where.endswith("rank"):
            assert variable.largest <= 1, variable
            continue
        # A recovery is in percent.
        size = 100.0 if "recovery_" in variable.where else 1.0
        if isinstance(variable.a, float):
            size = max(size, abs(variable.a))
        largest = max(largest, variable.largest / size)
        assert variable.largest / size <= 1e-5, variable
        assert not any((variable.unmatched, variable.only_a, variable.only_b)), variable
    return largest


@pytest.mark.parametrize("kind", CASES)
def test_kinds(server: str, kind: str, weights_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    names = {str(weights_folder / name): str(weights_folder / name) for name in ("base", "aligned")}
    where = json.dumps({"kind": "ndif", "host": server, "models": names})
    for name, case in CASES[kind].items():
        recipe = str(recipe_of(kind, case, weights_folder))
        here, there = tmp_path / f"{name} here.zarr", tmp_path / f"{name} there.zarr"
        assert main(["run", recipe, "--out", str(here), "--no-progress"]) == 0
        assert main(["run", recipe, "--out", str(there), "--no-progress", "--backend", where]) == 0
        compare(here, there)


def test_a_sweep_takes_at_most_three_times_as_long(server: str) -> None:
    clean = "When Mary and John went to the store, John gave a drink to"
    models = [
        nsp.load("smollm2", device="cpu", dtype="float32"),
        nsp.load("smollm2", dtype="float32", backend=backend(server, fetch_smollm2())),
    ]
    took: list[list[float]] = [[], []]
    values: list[Any] = [None, None]
    for _ in range(4):
        for number, model in enumerate(models):
            begin = time.monotonic()
            with model.trace(clean) as t:
                # The prompts differ from their first token on, so that nothing is pruned for being shared.
                t.sweep(nsp.patch("resid_post[*] @ *", donor=clean.replace("When", "Then").replace("Mary", "Anna")))
                t.measure(nsp.logit_diff(" Mary", " John"))
            values[number] = t.results["logit_diff"].values
            took[number].append(time.monotonic() - begin)
    assert values[0].size == 420
    np.testing.assert_allclose(values[1], values[0], atol=1e-5, rtol=1e-5)
    here, there = (float(np.median(one[1:])) for one in took)  # the first one deploys the model
    print(f"420 sites: {here:.1f} s here, {there:.1f} s there, {there / here:.2f} times as long")
    assert there <= 3 * here


def test_a_server_killed_in_the_middle(server: str, tmp_path: Path) -> None:
    if SERVE is None:
        pytest.skip("the server is not ours to kill")
    here, there = tmp_path / "here.zarr", tmp_path / "there.zarr"
    where = json.dumps({**backend(server, fetch_smollm2()), "retries": 0})
    components = "components=[resid_pre, resid_mid, resid_post, attn_out, mlp_out, z]"  # one unit of work each
    command = ["run", "ioi", "--set", components, "--no-progress", "--dtype", "float32"]
    assert main([*command, "--out", str(here)]) == 0

    def kill() -> None:
        while not ((there / "zarr.json").exists() and open_run(str(there)).done.any()):
            time.sleep(0.1)
        serve("stop")

    killer = threading.Thread(target=kill)
    killer.start()
    assert main([*command, "--out", str(there), "--backend", where]) == 1
    killer.join()
    assert open_run(str(there)).state == "running"
    left = len(open_run(str(there)).pending)
    assert 0 < left < 6
    serve("start")
    assert httpx.get(f"{HERE}/ping").status_code == 200
    assert main([*command, "--out", str(there), "--backend", where, "--resume"]) == 0
    print(f"killed with {left} of 6 units left; largest difference {compare(here, there):.1e}")
