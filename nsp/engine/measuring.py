"""Run branches: the trunk once, then every branch, by the branch path or the plain one, and put their numbers in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nsp.engine import shared_pass
from nsp.engine.branches import Branches, Ints
from nsp.engine.budget import Budget
from nsp.engine.measured import Measured, Numbers
from nsp.engine.pack import Pass, pack
from nsp.engine.passes import Lowered, lower_pass, lower_plain
from nsp.engine.runtime import Runtime
from nsp.engine.trunk import run_bases
from nsp.errors import InputError

Progress = Callable[[int, int], None]  # (branches done, branches in all)


def measure(runtime: Runtime, branches: Branches, budget: Budget, progress: Progress | None = None) -> Measured:
    """Run the branches, and their bases where these have not run yet, and measure their metrics.

    Bases and donors run in the pass of their branches where all fit one pass and that costs no more.
    """
    if branches.cells is not None and branches.cells.swept and not branches.bases.measures:
        raise InputError("a sweep needs something to measure: add a metric, for example logit_diff(' Mary', ' John')")
    with runtime.attention_for(branches.components):
        passes = pass_plan(runtime, branches, budget)
        numbers = shared_pass.run(runtime, branches, passes, budget)
        if numbers is None:
            trunk = run_bases(runtime, branches.bases, budget)
            base = trunk.values
            if branches.alone is not None:
                alone = Numbers(branches.alone, base)
                _run(runtime, alone, _plain_batches(runtime, branches.alone, budget), None)
                base = list(alone.values)
            numbers = Numbers(branches, base, trunk.reference)
            _run(runtime, numbers, passes, progress)
        elif progress is not None:
            progress(len(branches.live), len(branches.live))
    return numbers.measured(len(passes))


def pass_plan(runtime: Runtime, branches: Branches, budget: Budget) -> list[Pass | Ints]:
    """The passes that run every live branch: packed ones, or batches of whole rows."""
    if branches.bases.path == "branch":
        return list(pack(branches, runtime.cost, budget.branch_tokens(runtime, branches)))
    return list(_plain_batches(runtime, branches, budget))


def _plain_batches(runtime: Runtime, branches: Branches, budget: Budget) -> list[Ints]:
    live = branches.live
    if len(live) == 0:
        return []
    rows = budget.plain_rows(runtime, int(branches.end.max()))
    return [live[low : low + rows] for low in range(0, len(live), rows)]


def _run(runtime: Runtime, numbers: Numbers, passes: Sequence[Pass | Ints], progress: Progress | None) -> None:
    """Run passes and put their values in place."""
    done, total = 0, len(numbers.branches.live)
    for low in range(0, len(passes), runtime.together):
        done += _run_together(runtime, numbers, passes[low : low + runtime.together])
        if progress is not None:
            progress(done, total)


def _run_together(runtime: Runtime, numbers: Numbers, passes: Sequence[Pass | Ints]) -> int:
    """Run passes of which none needs another's numbers; returns their branches.

    A function by itself, so that the keys and values of these passes are let go before the next ones are made.
    """
    branches, ran = numbers.branches, []
    for chosen in passes:
        lower = lower_pass if isinstance(chosen, Pass) else lower_plain
        lowered = lower(runtime, branches, chosen)  # type: ignore[arg-type]
        ran.append((lowered, runtime.execute(lowered.program)))
    for lowered, outputs in ran:
        numbers.add(lowered, outputs)
        _let_go(lowered)
    return sum(len(lowered.branches) for lowered, _ in ran)


def _let_go(lowered: Lowered) -> None:
    """Empty a pass that has run: a trace's frames refer to it until the garbage collector comes by."""
    cache = lowered.program["inputs"].get("past_key_values")
    if cache is not None:
        cache.layers.clear()
    for entry in lowered.program["layers"]:
        entry["join"] = entry["keys"] = entry["values"] = None
        entry["writes"], entry["visits"] = [], []
