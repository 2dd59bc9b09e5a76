"""Kill -9 trials: writers of a synthetic run are killed at random moments, and what is left is checked.

A trial is one of three phases: `create` (killed while the store is created), `sweep` (many small units over effects,
receipts and a baseline), `capture` (fewer, larger units of activations). Workers append each unit to a log after
`write` returned: those are the acknowledged units.
"""

from __future__ import annotations

import multiprocessing
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import xarray as xr
from store_synthetic import PLAN, Case, assert_holds, capture, fill, header, sweep

from nsp.stores import create_run, open_run, open_writer, validate
from nsp.stores.backend import locate

PHASES = ("create", "sweep", "capture")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["store_trials", "nsp.stores.writer", "nsp.stores.local", "nsp.stores.versioned"])


@dataclass
class Tally:
    """What a number of trials found; everything after `killed` must be 0."""

    trials: int = 0
    killed: int = 0
    acknowledged: int = 0
    unopenable: int = 0
    lost: int = 0
    uncommitted_returned: int = 0
    wrong_after_resume: int = 0
    left_behind: int = 0

    def add(self, other: Tally) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def failures(self) -> int:
        return self.unopenable + self.lost + self.uncommitted_returned + self.wrong_after_resume + self.left_behind


def case_of(phase: str) -> Case:
    if phase == "capture":
        return capture(prompts=48, layers=4, positions=32, neurons=1024, step=2)  # large enough for shards
    return sweep(pairs=4, layers=8, positions=6, step=1)


def create(location: str, phase: str) -> None:
    """A worker that creates the store again and again, over itself."""
    case = case_of(phase)
    while True:
        create_run(location, case.tree, case.units, header=header(), force=True)


def work(location: str, phase: str, log: str, seed: int) -> None:
    """A worker that writes pending units and logs what was acknowledged."""
    case = case_of(phase)
    with open_writer(location, PLAN) as writer, Path(log).open("ab", buffering=0) as acknowledged:
        order = random.Random(seed)
        while pending := writer.pending():
            order.shuffle(pending)
            for index in pending:
                with writer.claim(index) as claimed:
                    if claimed:
                        writer.write(index, case.values(index))
                        acknowledged.write(f"{index}\n".encode())
        writer.mark("complete")


def trial(location: str, phase: str, writers: int, seed: int, longest: float) -> Tally:
    """One trial in an empty place: start, kill at a random moment, check, resume, check again."""
    found = Tally(trials=1)
    moment = random.Random(seed)
    case = case_of(phase)
    log = Path(f"{location.removeprefix('icechunk://')}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    if phase == "create":
        workers = [CONTEXT.Process(target=create, args=(location, phase))]
    else:
        create_run(location, case.tree, case.units, header=header())
        workers = [CONTEXT.Process(target=work, args=(location, phase, str(log), seed + at)) for at in range(writers)]
    for worker in workers:
        worker.start()
    _wait_for_life(location, phase, log, workers)
    time.sleep(moment.uniform(0, longest))
    found.killed = _kill(workers, moment)
    if not locate(location).exists():  # killed before, or between, creations
        create_run(location, case.tree, case.units, header=header())
    acknowledged = {int(line) for line in log.read_text().split()}
    found.acknowledged = len(acknowledged)
    if not _opens(location):
        found.unopenable += 1
        return found
    run = open_run(location)
    done = {index for index in range(len(case.units)) if run.done[index]}
    found.lost = len(acknowledged - done)
    found.uncommitted_returned = int(not _holds(run, case, done))
    fill(location, case)
    resumed = open_run(location)
    whole = resumed.state == "complete" and _holds(resumed, case, None) and validate(location, deep=True).ok
    found.wrong_after_resume = int(not whole)
    found.left_behind = int(any(Path(location).rglob("*.partial"))) if "://" not in location else 0
    return found


def _wait_for_life(location: str, phase: str, log: Path, workers: list[BaseProcess]) -> None:
    """Until the workers are at it, so that the kill falls into the work and not into the start of Python."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit and any(worker.is_alive() for worker in workers):
        started = locate(location).exists() if phase == "create" else log.stat().st_size > 0
        if started:
            return
        time.sleep(0.002)


def _kill(workers: list[BaseProcess], moment: random.Random) -> int:
    alive = 0
    for worker in workers:
        alive += worker.is_alive()
        worker.kill()
        if len(workers) > 1:
            time.sleep(moment.uniform(0, 0.02))
    for worker in workers:
        worker.join(30)
    return alive


def _opens(location: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            xr.open_datatree(locate(location).open_store(), engine="zarr", consolidated=False).load()
            open_run(location).tree.load()
    except Exception:
        return False
    return True


def _holds(run: Any, case: Case, done: Any) -> bool:
    try:
        assert_holds(run, case, done)
    except AssertionError:
        return False
    return True


def plan(trials: int, directory: Path, *, icechunk: bool, seed: int = 0) -> Iterator[tuple[str, str, int, str, int]]:
    """(backend, phase, writers, location, seed) of `trials` trials, spread evenly over what there is to try."""
    kinds = [
        (backend, phase, writers)
        for backend in (["local", "icechunk"] if icechunk else ["local"])
        for phase in PHASES
        for writers in ((1,) if phase == "create" else (1, 4))
    ]
    for number in range(trials):
        backend, phase, writers = kinds[number % len(kinds)]
        path = directory / f"{backend}-{phase}-{writers}-{number}"
        location = f"icechunk://{path}" if backend == "icechunk" else f"{path}.zarr"
        yield backend, phase, writers, location, seed + number


LONGEST = {("local", "create"): 0.4, ("local", "sweep"): 1.0, ("local", "capture"): 0.4}
"""Seconds of work after which the kill comes at the latest, about as long as the work takes."""


def longest(backend: str, phase: str) -> float:
    return LONGEST.get((backend, phase), 2 * LONGEST["local", phase])
