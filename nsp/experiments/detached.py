"""Runs that nobody waits for: every unit goes as far as the answers that are here, and its next request is left on the server.

A unit whose request was not answered yet is run again later, by `nsp jobs STORE --collect` or by `nsp run` in another
process: what was answered is not asked again (`nsp.backends.ledger`). A unit of one request is finished by one
collection; one whose requests stand on one another's answers takes as many.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nsp.backends.ledger import WAITING, Ledger, WaitingError
from nsp.errors import BackendError, InputError
from nsp.experiments import runner

if TYPE_CHECKING:
    from nsp.backends.options import BackendOptions
    from nsp.experiments.experiment import Experiment


@dataclass(frozen=True)
class Progress:
    """How far a detached run is: units finished and in all, and the jobs that wait on the server."""

    finished: int
    units: int
    waiting: int

    def __str__(self) -> str:
        if self.finished == self.units:
            return f"all {self.units} units of work are finished"
        return f"{self.finished} of {self.units} units of work are finished; {self.waiting} jobs wait on the server"


def check_server(backend: BackendOptions) -> None:
    """InputError where a backend has no server to leave jobs on."""
    if backend.kind != "ndif":
        raise InputError(f"--detach leaves jobs on a server, and {backend.label} has none; write --backend ndif")


def advance(experiment: Experiment[Any], place: str, ledger: Ledger) -> Progress:
    """Bring every unit of the run at ``place`` as far as the answers that are on the server now, and leave the next
    requests there. A unit that needs what others compute waits until those are committed.

    The store must exist (`nsp.experiments.runner.prepare_store`). An error of a job leaves the other units as they are.
    """
    from nsp.stores import open_run, open_writer

    problems: list[BackendError] = []
    with open_writer(place, experiment.plan.hash) as writer:
        units = runner.stored_units(experiment, writer)
        pending = writer.pending()
        with ledger.taken_up(runner.job_records(place), detach=True):
            for index in pending:
                left = {path for other in writer.pending() for path in units[other].regions}
                if left & set(experiment.needs(units[index])):
                    continue
                with writer.claim(index) as claimed:
                    if not claimed:
                        continue
                    done = False
                    try:
                        stored = runner.stored_groups(place)
                        writer.write(index, experiment.compute(units[index], stored))
                        done = True
                    except WaitingError:
                        pass
                    except BackendError as error:
                        problems.append(error)
                    finally:
                        ledger.settle(done)
                        runner.keep_jobs(writer, index, ledger.drain())
                gc.collect()  # what an unfinished unit holds must not travel with the next one's jobs
            waiting = len(writer.pending())
            if not waiting:
                ledger.forget()
        runner.finish(experiment, writer, place, computed=bool(pending))
    if problems:
        raise problems[0]
    return Progress(len(units) - waiting, len(units), len(waiting_jobs(open_run(place).header)))


def waiting_jobs(header: Any) -> list[dict[str, Any]]:
    """The records of jobs that a store's header says were handed over and not collected."""
    return [record for record in header.get("extra", {}).get("jobs", []) if record.get("state") == WAITING]
