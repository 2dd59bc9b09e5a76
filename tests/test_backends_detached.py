"""Runs that are left on a server: one process hands them over and is gone, another one collects them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_models as tiny
import httpx
import pytest
import torch
from engine_models import one_thread  # noqa: F401
from ndif_server import Double, checkpoint, start_double, without_self_check

from nsp.backends.ledger import request_id
from nsp.cli.app import main
from nsp.stores import diff, open_run

RECIPES: dict[str, dict[str, Any]] = {
    "patching": {
        "kind": "activation-patching",
        "pairs": [
            {"clean": tiny.text(tiny.CLEAN), "corrupt": tiny.text(tiny.CORRUPT), "answer": "w7", "distractor": "w9"}
        ],
        "components": ["resid_pre", "resid_post", "z"],
        "metric": "logit_diff",
    },
    "capture": {"kind": "capture", "prompts": [tiny.text(tiny.CLEAN), tiny.text(tiny.CORRUPT)]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, recipes, and their stores as this process makes them."""
    made = tmp_path_factory.mktemp("run")
    checkpoint(made / "weights")
    for name, keys in RECIPES.items():
        recipe = {"model": {"name": "./weights", "dtype": "float32"}, **keys}
        (made / f"{name}.yaml").write_text(json.dumps(recipe))
        assert main(["run", str(made / f"{name}.yaml"), "--out", str(made / f"{name}.zarr"), "--no-progress"]) == 0
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, double: Double) -> Iterator[None]:
    """A cache of its own, no self-check, and a server that holds nothing when the test is over."""
    monkeypatch.setenv("NSP_CACHE", str(tmp_path / "cache"))
    without_self_check(monkeypatch.setattr)
    yield
    double.fault("hold", 0)


def command(folder: Path, name: str, out: Path, server: Double, *more: str) -> list[str]:
    where = json.dumps({"kind": "ndif", "host": server.address, "model": str(folder / "weights")})
    return ["run", str(folder / f"{name}.yaml"), "--out", str(out), "--backend", where, "--no-progress", *more]


def records(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = open_run(str(out)).header["extra"]["jobs"]
    return found


def ended(out: Path) -> None:
    """Wait until the server is through with every job that was left there."""
    for job in records(out):
        for _ in range(600):
            if job["state"] != "waiting":
                break
            if httpx.get(f"{job['host']}/response/{job['id']}").json()["status"] in ("COMPLETED", "ERROR"):
                break
            time.sleep(0.1)


def collected(out: Path, most: int = 20) -> int:
    """How many collections finish a run."""
    for times in range(1, most + 1):
        ended(out)
        assert main(["jobs", str(out), "--collect"]) == 0
        if open_run(str(out)).state == "complete":
            return times
    raise AssertionError("it is never finished")


def assert_same(expected: Path, found: Path) -> None:
    compared = diff(str(expected), str(found))
    assert compared.only_a == compared.only_b == ()
    for variable in compared.variables:
        assert variable.largest <= (1e-3 if "recovery_" in variable.where else 1e-5), variable
        assert not variable.unmatched, variable


def test_another_process_collects(
    folder: Path, double: Double, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "detached.zarr"
    before = len(double.seen())
    # The process that hands the jobs over orders its sets in its own way, and is gone afterwards.
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from ndif_server import without_self_check; without_self_check()\n"
        "import torch; torch.set_num_threads(1)\n"
        "from nsp.cli.app import main; sys.exit(main(sys.argv[1:]))"
    )
    double.fault("hold")
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    arguments = command(folder, "patching", out, double, "--detach")
    ended = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "0 of 3 units of work are finished; " in ended.stderr
    handed = records(out)
    assert handed
    assert all(job["state"] == "waiting" and job["id"] and job["sent"] and job["request"] for job in handed)
    # What is not ready stays where it is.
    assert main(["jobs", str(out), "--collect"]) == 0
    said = capsys.readouterr()
    assert "0 of 3 units" in said.err
    assert "queued" in said.out
    assert handed[0]["id"] in said.out
    assert "wait on the server" in said.out
    assert records(out) == handed
    double.fault("hold", 0)
    # The base run's numbers first, then the branches.
    assert collected(out) == 2
    assert_same(folder / "patching.zarr", out)
    jobs = records(out)
    assert all(job["state"] == "done" and job["received"] for job in jobs)
    assert {job["id"] for job in handed} <= {job["id"] for job in jobs}
    # Nothing was asked twice.
    assert len(double.seen()) - before == len(jobs) == len({job["request"] for job in jobs})
    assert not list((tmp_path / "cache" / "answers").glob("*"))
    capsys.readouterr()
    assert main(["show", str(out)]) == 0
    assert f"{len(jobs)} jobs, " in capsys.readouterr().out


def test_a_unit_of_one_request_is_one_collection(folder: Path, double: Double, tmp_path: Path) -> None:
    out = tmp_path / "detached.zarr"
    assert main(command(folder, "capture", out, double, "--detach")) == 0
    assert collected(out) == 1
    assert_same(folder / "capture.zarr", out)


def test_a_run_goes_on_with_what_was_left(folder: Path, double: Double, tmp_path: Path) -> None:
    out = tmp_path / "detached.zarr"
    assert main(command(folder, "patching", out, double, "--detach")) == 0
    handed = {job["id"] for job in records(out)}
    assert main(command(folder, "patching", out, double)) == 0
    assert open_run(str(out)).state == "complete"
    assert handed <= {job["id"] for job in records(out) if job["state"] == "done"}
    assert_same(folder / "patching.zarr", out)


def test_a_server_that_lost_its_jobs_gets_them_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nsp.backends.ndif._POLL", 0.01)
    first, out = start_double(tmp_path), tmp_path / "detached.zarr"
    try:
        first.fault("hold")
        assert main(command(folder, "capture", out, first, "--detach")) == 0
    finally:
        first.stop()
    second = first.again()
    try:
        assert main(["jobs", str(out)]) == 0
        assert "gone" in capsys.readouterr().out
        assert main(["jobs", str(out), "--collect"]) == 0
        assert "knows job" in capsys.readouterr().err
        assert collected(out) == 1
    finally:
        second.stop()
    assert_same(folder / "capture.zarr", out)


def test_a_job_that_failed_says_so_and_is_sent_again(
    folder: Path, double: Double, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "detached.zarr"
    double.fault("fail")
    assert main(command(folder, "capture", out, double, "--detach")) == 0
    ended(out)
    assert main(["jobs", str(out), "--collect"]) == 1
    assert "the job failed on the server: RuntimeError: out of memory" in capsys.readouterr().err
    assert [job["state"] for job in records(out)] == ["failed"]
    assert main(["jobs", str(out), "--collect"]) == 0
    assert collected(out) == 1


def test_what_cannot_be_detached(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "detached.zarr"
    assert main(["run", str(folder / "capture.yaml"), "--out", str(out), "--detach"]) == 2
    assert "--detach leaves jobs on a server, and local has none" in capsys.readouterr().err
    assert main(["jobs", str(folder / "capture.zarr"), "--collect"]) == 0
    assert not out.exists()


def test_jobs_lists_every_store(
    folder: Path, double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["jobs"]) == 0
    assert "no run below ./runs" in capsys.readouterr().err
    double.fault("hold")
    assert main(command(folder, "capture", Path("runs/left.zarr"), double, "--detach")) == 0
    double.fault("hold", 0)
    capsys.readouterr()
    assert main(["jobs"]) == 0
    said = capsys.readouterr().out
    assert "runs/left.zarr" in said
    assert "1 of them wait" in said
    assert main(["jobs", "--collect"]) == 2


def test_requests_are_told_apart_by_all_that_they_ask() -> None:
    def asked(**changes: Any) -> str:
        step = {"do": "call", "name": "Tensor.add", "args": [torch.arange(4.0), 1.0], "kwargs": {}, **changes}
        return request_id("model", [step], [0], "eager")

    same = asked()
    assert same == asked()
    others = [
        asked(name="Tensor.sub"),
        asked(args=[torch.arange(4.0), 2.0]),
        asked(args=[torch.arange(4), 1.0]),
        asked(args=[torch.arange(4.0)[None], 1.0]),
        asked(kwargs={"alpha": 1.0}),
        asked(args=[[torch.arange(4.0), 1.0]]),
    ]
    assert len({same, *others}) == 1 + len(others)
