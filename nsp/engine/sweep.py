"""Run a set of counterfactuals: trunk and donors once, then every branch, by the branch path or the plain one.

The one entry point of experiments and traces: describe the work in a `Request`, get numbers with their evidence
    in an `Outcome`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from nsp.datasets.alignment import Alignment, align
from nsp.engine.baseline_runs import BaselineRuns, run_baseline
from nsp.engine.branches import BranchTable, Ints, Source
from nsp.engine.budget import Budget
from nsp.engine.joint import run_joint
from nsp.engine.lowering import Resolved, build_table, grid_of, resolve
from nsp.engine.operands import make_operand, needed_slots, prompt_source, recorded_source
from nsp.engine.outcome import Numbers, Outcome, Prepared, Tally
from nsp.engine.pack import Pass, pack
from nsp.engine.passes import Lowered, lower_pass, lower_plain
from nsp.engine.readout import Measure, at_head
from nsp.engine.recording import Recording
from nsp.engine.request import PromptDonors as PromptDonors
from nsp.engine.request import Request as Request
from nsp.engine.request import check_request as check_request
from nsp.engine.request import continued as continued
from nsp.engine.request import measured_positions as measured_positions
from nsp.engine.request import request_measures as request_measures
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot
from nsp.errors import InputError
from nsp.interventions import Patch
from nsp.metrics import METRICS

Progress = Callable[[int, int], None]  # (branches done, branches in all)


def run_request(runtime: Runtime, request: Request, budget: Budget, progress: Progress | None = None) -> Outcome:
    """Run everything that ``request`` describes."""
    path, reason = choose_path(runtime, request)
    with runtime.attention_for(item.site.component for item in (*request.swept, *request.fixed)):
        if path == "branch" and (outcome := run_joint(runtime, request, budget, reason)) is not None:
            if progress is not None:
                progress(outcome.branches, outcome.branches)
            return outcome
        prepared = prepare(runtime, request, path, budget)
        if request.fixed and request.axes and request.metrics:
            prepared.base = _fixed_base(runtime, request, budget)
        return run_prepared(runtime, prepared, budget, path, reason, progress)


def _fixed_base(runtime: Runtime, request: Request, budget: Budget) -> list[np.ndarray]:
    """The base of a sweep whose branches all carry fixed interventions: the run with those alone."""
    donors = request.donors[len(request.swept) :]
    alone = replace(request, swept=(), axes=(), donors=donors, path="plain")
    prepared = prepare(runtime, alone, "plain", budget)
    tally = Tally(prepared)
    run_branches(runtime, tally, prepared.trunk, budget, "plain")
    return [prepared.grid.scatter(value)[:, 0, 0, 0] for value in tally.values]


def choose_path(runtime: Runtime, request: Request) -> tuple[str, str]:
    """Which path runs, and why."""
    if not request.axes:
        return "plain", "one counterfactual: a single full forward pass"
    if request.path == "plain":
        return "plain", "asked for"
    refusal = runtime.branch_refusal
    if request.path == "branch":
        if refusal:
            raise InputError(f"the branch path cannot run here: {refusal}")
        return "branch", "asked for"
    if refusal:
        return "plain", refusal
    return "branch", "attention is causal and the self-check passed"


def prepare(runtime: Runtime, request: Request, path: str, budget: Budget) -> Prepared:
    """Resolve sites, run bases, donors and references, and build the table of branches."""
    prompts = request.bases
    check_request(runtime, request)
    interventions = [(item, True) for item in request.swept] + [(item, False) for item in request.fixed]
    sites = [resolve(runtime, item.site, prompts) for item, _ in interventions]
    grid = grid_of(sites[: len(request.swept)], request.axes, len(prompts))
    donors = request.donors or (None,) * len(sites)
    alignments = [
        None
        if donor is None
        else tuple(align(base, other, item.site.positions) for base, other in zip(prompts, donor.prompts, strict=True))
        for item, donor in zip(sites, donors, strict=True)
    ]
    measures, moved = request_measures(request)
    whole = continued(request)
    baseline = _run_baseline(runtime, whole, sites, measures, moved, path, budget)
    resolved = []
    for number, ((intervention, moving), item) in enumerate(zip(interventions, sites, strict=True)):

        def source(patch: Patch, site: Resolved, number: int = number) -> tuple[Source, tuple[Alignment, ...] | None]:
            donor, aligned = (whole.donors or donors)[number], alignments[number]
            if donor is None or aligned is None:
                return recorded_source(runtime, site, patch.donor, prompts), None
            return prompt_source(baseline.recording, baseline.rows(donor.prompts), aligned), aligned

        resolved.append((item, make_operand(runtime, intervention, item, prompts, source), moving))
    base, reference = _baseline_metrics(runtime, whole, baseline, measures, moved)
    table = build_table(
        runtime,
        prompts,
        resolved,
        grid,
        measured_positions(whole, measures),
        prune=bool(request.axes) and not request.whole,
        cumulative=request.cumulative,
    )
    trunk = baseline.recording.only(baseline.rows(whole.bases))
    return Prepared(request, resolved, grid, table, trunk, measures, base, reference)


def _run_baseline(
    runtime: Runtime,
    request: Request,
    sites: Sequence[Resolved],
    measures: Sequence[Measure],
    moved: Sequence[tuple[int, ...]] | None,
    path: str,
    budget: Budget,
) -> BaselineRuns:
    """Bases, donors and references in one batch: each distinct prompt runs once."""
    slots: set[Slot] = set()
    if path == "branch":
        slots |= {(BOUNDARY, layer) for layer in range(runtime.geometry.n_layers + 1)}
    prompts = list(request.bases)
    for item, donor in zip(sites, request.donors or (None,) * len(sites), strict=True):
        if donor is not None:
            prompts += donor.prompts
            slots |= needed_slots(item)
    head = at_head(measures)
    places = [place for number in head for place in zip(request.bases, measures[number].positions, strict=True)]
    slots |= {(BOUNDARY, measure.boundary) for measure in measures if measure.boundary is not None}
    if request.reference is not None and moved is not None:
        prompts += request.reference
        places += [place for number in head for place in zip(request.reference, moved[number], strict=True)]
    longest = max(len(prompt) for prompt in prompts)
    return run_baseline(
        runtime,
        prompts,
        slots,
        places,
        [measures[number] for number in head],
        keep_cache=path == "branch",
        max_tokens=longest * budget.plain_rows(runtime, longest),
    )


def _baseline_metrics(
    runtime: Runtime, request: Request, baseline: BaselineRuns, measures: list[Measure], moved: list[tuple[int, ...]] | None
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Every metric on the bases and on the references; fills the reference logits of distances."""
    for number, measure in enumerate(measures):
        if not METRICS[measure.metric.kind].reference:
            continue
        if measure.metric.reference == "base":
            measure.reference = baseline.logits_at(request.bases, measure.positions)
        elif request.reference is None or moved is None:
            raise InputError(
                f"{measure.metric.name}: there is no donor run to measure the distance from; give reference='base'"
            )
        else:
            measure.reference = baseline.logits_at(request.reference, moved[number])
    found = [baseline.measured(measure, request.bases, measure.positions) for measure in measures]
    if request.reference is not None and moved is not None:
        pairs = zip(measures, moved, strict=True)
        found += [baseline.measured(measure, request.reference, positions) for measure, positions in pairs]
    values = [np.asarray(value.cpu().numpy()) for value in runtime.fetch(found)]
    return values[: len(measures)], values[len(measures) :] if len(values) > len(measures) else None


def run_prepared(
    runtime: Runtime, prepared: Prepared, budget: Budget, path: str, reason: str, progress: Progress | None = None
) -> Outcome:
    """Run the branches of a prepared request and put their numbers in place."""
    tally = Tally(prepared)
    passes = run_branches(runtime, tally, prepared.trunk, budget, path, progress)
    return tally.outcome(path, reason, passes)


def run_branches(
    runtime: Runtime, numbers: Numbers, trunk: Recording, budget: Budget, path: str, progress: Progress | None = None
) -> int:
    """Run every live branch of the table of ``numbers`` from ``trunk`` and put its values there; returns the passes."""
    table = numbers.table
    work = plan_passes(runtime, table, budget, path)
    done, total = 0, len(table.live)
    for low in range(0, len(work), runtime.together):
        done += _run_passes(runtime, numbers, trunk, work[low : low + runtime.together])
        if progress is not None:
            progress(done, total)
    return len(work)


def _run_passes(runtime: Runtime, numbers: Numbers, trunk: Recording, chunks: Sequence[Pass | Ints]) -> int:
    """Run passes and put their values in place; returns their branches.

    A function of its own, so that the keys and values of these passes are let go before the next ones are made.
    """
    table, measures = numbers.table, numbers.measures
    ran = []
    for chunk in chunks:
        lowered = (
            lower_pass(runtime, table, trunk, measures, chunk)
            if isinstance(chunk, Pass)
            else lower_plain(runtime, table, trunk, measures, chunk)
        )
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


def plan_passes(runtime: Runtime, table: BranchTable, budget: Budget, path: str) -> list[Pass | Ints]:
    """The passes that run every live branch: packed ones, or batches of whole rows."""
    if path == "branch":
        return list(pack(table, runtime.cost, budget.branch_tokens(runtime, table)))
    live = table.live
    if len(live) == 0:
        return []
    rows = budget.plain_rows(runtime, int(table.end.max()))
    return [live[low : low + rows] for low in range(0, len(live), rows)]
