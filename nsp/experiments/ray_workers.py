"""Many workers on one run: Ray actors that each hold the model and commit units of work to one store.

Units fill disjoint regions of the store, a unit is committed whole or not at all, and a claim on it ends with the
process that holds it. So a worker that dies costs the unit it had at hand, which another one computes again, and the
store is the same whoever wrote what.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsp.backends.options import BackendOptions
from nsp.errors import BackendError, InputError, NspError
from nsp.experiments import registry, runner

# A unit whose workers died this often is taken for the cause of their deaths.
_DEATHS = 3

Finished = Callable[[int, list[dict[str, Any]]], None]
"""(unit, records of its jobs on servers), called when a unit is committed."""
Spread = Callable[[str, str, Sequence[Sequence[int]], Finished, Callable[[str], None]], None]
"""(store, plan hash, batches of pending units, called for each finished one, called with what a user should know). A
batch begins when the one before it is committed."""


@dataclass(frozen=True)
class Shared:
    """What every worker is told: the recipe as plain data, the store, where its own model runs, and by how many threads.

    ``module`` is where the kind of experiment is defined, and ``folder`` where that module lies.
    """

    recipe: Mapping[str, Any]
    module: str
    folder: str
    place: str
    plan_hash: str
    inner: Mapping[str, Any] | None
    cuda: bool
    threads: int


class Worker:
    """One actor: a model, the prepared experiment, and a writer of the store."""

    def __init__(self, shared: Shared) -> None:
        import torch

        from nsp.backends.options import backend_options
        from nsp.experiments.models import load_model
        from nsp.stores import open_writer

        # The cores it was given, whatever this process found in its environment: a sum's last digit depends on it.
        torch.set_num_threads(shared.threads)
        if not shared.module.startswith("nsp."):  # found where the process that started this one found it
            sys.path.append(shared.folder)
        importlib.import_module(shared.module)
        kind = registry.experiment_of(shared.recipe["kind"])
        recipe = kind.recipe_class.model_validate(dict(shared.recipe))
        options = recipe.model
        if shared.cuda and options.device is None:
            options = options.model_copy(update={"device": "cuda"})
        self.model = load_model(options, backend_options(shared.inner))
        self.experiment = kind(self.model, recipe)
        if self.experiment.plan.hash != shared.plan_hash:
            raise NspError(
                f"a worker made another plan ({self.experiment.plan.hash[:12]}) than this process ({shared.plan_hash[:12]}): its "
                "model, its tokenizer or its nsp is not the same"
            )
        self.place = shared.place
        self.writer = open_writer(shared.place, shared.plan_hash)
        self.units = runner.stored_units(self.experiment, self.writer)

    def run(self, index: int) -> list[dict[str, Any]]:
        """Compute and commit one unit, unless it is committed or another writer has it; the records of its jobs."""
        with self.writer.claim(index) as claimed:
            if claimed:
                stored = runner.stored_groups(self.place)
                self.writer.write(index, self.experiment.compute(self.units[index], stored))
        return self.model.jobs()

    def process(self) -> int:
        """The id of the actor's process."""
        return os.getpid()


def spread_over(recipe: Mapping[str, Any], options: BackendOptions) -> Spread:
    """What `nsp.experiments.runner.run` calls to have its units computed by workers: a recipe in full, as plain data."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("backend ray needs Ray: pip install 'nsp[ray]'")

    def spread(
        place: str, plan_hash: str, batches: Sequence[Sequence[int]], finished: Finished, tell: Callable[[str], None]
    ) -> None:
        where = place if "://" in place else os.path.abspath(place)
        inner = None if options.inner is None else options.inner.model_dump(exclude_defaults=True)
        kind = registry.experiment_of(recipe["kind"])
        folder = str(Path(str(sys.modules[kind.__module__].__file__)).parent)
        shared = Shared(
            recipe, kind.__module__, folder, where, plan_hash, inner, options.gpus > 0, max(1, int(options.cpus))
        )
        run_sharded(shared, options, batches, finished, tell)

    return spread


def run_sharded(
    shared: Shared,
    options: BackendOptions,
    batches: Sequence[Sequence[int]],
    finished: Finished,
    tell: Callable[[str], None],
) -> None:
    """Have the units of all ``batches`` computed by workers; ``finished`` is told each one, with the records of its jobs.

    A worker that dies is replaced and its unit given out again; an error of a worker's own is raised here.
    """
    import ray

    coming = deque(batches)
    todo: deque[int] = deque()
    deaths: Counter[int] = Counter()
    with _cluster(options):
        count = min(options.workers, max(map(len, batches)))
        remote: Any = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus)(Worker)
        idle = [remote.remote(shared) for _ in range(count)]
        busy: dict[Any, tuple[Any, int]] = {}
        while coming or todo or busy:
            if not todo and not busy:
                todo = deque(coming.popleft())
            while todo and idle:
                worker, index = idle.pop(), todo.popleft()
                busy[worker.run.remote(index)] = worker, index
            ready, _ = ray.wait(list(busy), num_returns=1)
            for done in ready:
                worker, index = busy.pop(done)
                try:
                    jobs = ray.get(done)
                except ray.exceptions.RayActorError as error:
                    if "creation task" in str(error):
                        raise _of_worker(error) from error
                    deaths[index] += 1
                    if deaths[index] >= _DEATHS:
                        raise BackendError(
                            f"unit {index}: {_DEATHS} workers died over it; the last: {_first(error)}"
                        ) from error
                    tell(f"a worker died; unit {index} is given to a new one")
                    todo.appendleft(index)
                    idle.append(remote.remote(shared))
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise _of_worker(error) from error
                idle.append(worker)
                finished(index, jobs)


@contextmanager
def _cluster(options: BackendOptions) -> Iterator[None]:
    """A connection to a cluster, or a cluster of this machine for as long as the block runs."""
    import ray

    how: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if options.host is not None:
        how["address"] = options.host
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        how |= {"num_cpus": max(1, int(options.workers * options.cpus)), "include_dashboard": False}
        if options.gpus:
            del how["num_cpus"]
    try:
        ray.init(**how)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(f"no Ray cluster at {options.host or 'this machine'}: {_first(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _of_worker(error: Exception) -> NspError:
    """An error that a worker raised, as it would have been raised here."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, NspError):
        return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return NspError(f"a worker failed: {lines[-1] if lines else type(error).__name__}")


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
