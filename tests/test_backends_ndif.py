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
import pytest
from ndif_server import checkpoint
from test_backends import STATEMENTS, assert_same, run

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


@pytest.mark.parametrize("recipe", ["ioi", "patchscope", "steering", "neuron-circuit"])
def test_recipes(server: str, recipe: str, tmp_path: Path) -> None:
    where = json.dumps(backend(server, fetch_smollm2()))
    took = []
    for name, options in {"here": [], "there": ["--backend", where]}.items():
        begin = time.monotonic()
        out = ["--out", str(tmp_path / f"{name}.zarr"), "--no-progress", "--dtype", "float32"]
        assert main(["run", recipe, *out, *options]) == 0
        took.append(time.monotonic() - begin)
    compare(tmp_path / "here.zarr", tmp_path / "there.zarr")
    print(f"{recipe}: {took[0]:.1f} s here, {took[1]:.1f} s there")


def compare(expected: Path, found: Path) -> None:
    compared = diff(str(expected), str(found))
    assert not compared.only_a
    assert not compared.only_b
    for variable in compared.variables:
        assert variable.largest <= 1e-5, variable
        assert not variable.unmatched, variable


def test_a_server_killed_in_the_middle(server: str, tmp_path: Path) -> None:
    if SERVE is None:
        pytest.skip("the server is not ours to kill")
    here, there = tmp_path / "here.zarr", tmp_path / "there.zarr"
    where = json.dumps({**backend(server, fetch_smollm2()), "retries": 0})
    command = ["run", "ioi-set", "--set", "pairs.size=12", "--no-progress", "--dtype", "float32"]
    assert main([*command, "--out", str(here)]) == 0

    def kill() -> None:
        while not (there.exists() and open_run(str(there)).header["extra"].get("jobs")):
            time.sleep(0.2)
        serve("stop")

    killer = threading.Thread(target=kill)
    killer.start()
    assert main([*command, "--out", str(there), "--backend", where]) == 1
    killer.join()
    assert open_run(str(there)).state == "running"
    serve("start")
    assert httpx.get(f"{HERE}/ping").status_code == 200
    assert main([*command, "--out", str(there), "--backend", where, "--resume"]) == 0
    compare(here, there)
