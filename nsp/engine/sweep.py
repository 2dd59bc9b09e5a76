"""Run a set of counterfactuals: trunk and donors once, then every branch, by the branch path or the plain one.

The one entry point of experiments and traces: describe the work in a `Request`, get numbers with their evidence
    in an `Outcome`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from nsp.datasets.alignment import Alignment, align
from nsp.datasets.prompts import Prompt
from nsp.engine.branches import BranchTable, Ints, Source
from nsp.engine.budget import Budget
from nsp.engine.capture import BOUNDARY, Capture, Slot, check_ids
from nsp.engine.lowering import (
    Grid,
    Operand,
    Resolved,
    build_table,
    grid_of,
    make_operand,
    needed_slots,
    prompt_source,
    recorded_source,
    resolve,
)
from nsp.engine.ordinary import Ordinary, run_ordinary
from nsp.engine.pack import Pass, pack
from nsp.engine.passes import Lowered, lower_pass, lower_plain
from nsp.engine.program import Outputs
from nsp.engine.readout import Measure, unsorted_metrics
from nsp.engine.receipts import Receipt, receipts_of
from nsp.engine.runtime import Runtime
from nsp.errors import InputError
from nsp.interventions import Intervention, Patch
from nsp.metrics import METRICS, Metric

Progress = Callable[[int, int], None]  # (branches done, branches in all)


@dataclass(frozen=True, eq=False)
class PromptDonors:
    """The donor of a patch as prompts: one for each base prompt, aligned with it."""

    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, eq=False)
class Request:
    """What to run.

    Attributes:
        bases: the base prompts.
        swept: interventions that move together over the cells of ``axes``; ``fixed`` ones are stated in every branch.
        axes: the swept axes, of ``layer``, ``position``, ``unit``.
        donors: for each swept, then each fixed intervention: its donor prompts (patches from prompts), else None.
        metrics: what is measured; ``tokens[m]`` holds the token ids of metric ``m`` with axes (base, 1 or 2), or None.
        reference: the donor run's prompts that distances and effects are measured from, or None.
        whole: run each branch to the end of its prompt with nothing pruned, since what follows is generated from it.
        path: ``auto`` takes the branch path where it is right; ``branch`` and ``plain`` insist.
    """

    bases: tuple[Prompt, ...]
    swept: tuple[Intervention, ...]
    metrics: tuple[Metric, ...]
    tokens: tuple[torch.Tensor | None, ...]
    fixed: tuple[Intervention, ...] = ()
    axes: tuple[str, ...] = ()
    donors: tuple[PromptDonors | None, ...] = ()
    reference: tuple[Prompt, ...] | None = None
    path: str = "auto"
    whole: bool = False


@dataclass(eq=False)
class Outcome:
    """What came out of a `Request`.

    Attributes:
        grid: the cells; ``swept`` the resolved sites.
        values: one array a metric with axes (base, layer, position, unit), 1 where an axis is not swept, NaN
            where a base has no such cell.
        base, reference: one array a metric with axis (base,): the run without the swept interventions, and the donor's.
        change: L2 norm of what the swept interventions changed, same axes as ``values``; NaN where there is no cell.
        fired: how many writes the swept interventions made, same axes; 0 where the effect is exactly zero and
            nothing ran.
        receipts: the evidence, one for each intervention.
        path, reason: which path ran, and why.
        passes, branches, pruned: counts.
    """

    grid: Grid
    swept: tuple[Resolved, ...]
    values: list[np.ndarray]
    base: list[np.ndarray]
    reference: list[np.ndarray] | None
    change: np.ndarray
    fired: np.ndarray
    receipts: tuple[Receipt, ...]
    path: str
    reason: str
    passes: int
    branches: int
    pruned: int
    warnings: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Prepared:
    """A request with everything known before its branches run."""

    request: Request
    resolved: list[tuple[Resolved, Operand, bool]]
    grid: Grid
    table: BranchTable
    trunk: Capture
    measures: list[Measure]
    base: list[np.ndarray]
    reference: list[np.ndarray] | None


def run_request(runtime: Runtime, request: Request, budget: Budget, progress: Progress | None = None) -> Outcome:
    """Run everything that ``request`` describes."""
    path, reason = choose_path(runtime, request)
    with runtime.attention_for(item.site.component for item in (*request.swept, *request.fixed)):
        prepared = prepare(runtime, request, path, budget)
        if request.fixed and request.axes and request.metrics:
            prepared.base = _fixed_base(runtime, request, budget)
        return run_prepared(runtime, prepared, budget, path, reason, progress)


def _fixed_base(runtime: Runtime, request: Request, budget: Budget) -> list[np.ndarray]:
    """The base of a sweep whose branches all carry fixed interventions: the run with those alone."""
    donors = request.donors[len(request.swept) :]
    alone = replace(request, swept=(), axes=(), donors=donors, path="plain")
    prepared = prepare(runtime, alone, "plain", budget)
    return [value[:, 0, 0, 0] for value in run_prepared(runtime, prepared, budget, "plain", "asked for").values]


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
    ordinary = _run_ordinary(runtime, request, sites, measures, moved, path, budget)
    resolved = []
    for number, ((intervention, moving), item) in enumerate(zip(interventions, sites, strict=True)):

        def source(patch: Patch, site: Resolved, number: int = number) -> tuple[Source, tuple[Alignment, ...] | None]:
            donor, aligned = donors[number], alignments[number]
            if donor is None or aligned is None:
                return recorded_source(runtime, site, patch.donor, prompts), None
            return prompt_source(ordinary.capture, ordinary.rows(donor.prompts), aligned), aligned

        resolved.append((item, make_operand(runtime, intervention, item, prompts, source), moving))
    base, reference = _ordinary_metrics(request, ordinary, measures, moved)
    table = build_table(
        runtime,
        prompts,
        resolved,
        grid,
        measured_positions(request, measures),
        prune=bool(request.axes) and not request.whole,
    )
    trunk = ordinary.capture.only(ordinary.rows(prompts))
    return Prepared(request, resolved, grid, table, trunk, measures, base, reference)


def request_measures(request: Request) -> tuple[list[Measure], list[tuple[int, ...]] | None]:
    """The measures on the bases, and the positions that they read on the reference prompts."""
    positions = [tuple(_position(metric, prompt) for prompt in request.bases) for metric in request.metrics]
    measures = [Measure(*rest) for rest in zip(request.metrics, request.tokens, positions, strict=True)]
    if request.reference is None:
        return measures, None
    moved = []
    for metric in request.metrics:
        pairs = zip(request.bases, request.reference, strict=True)
        moved.append(tuple(_reference_position(metric, base, donor) for base, donor in pairs))
    return measures, moved


def measured_positions(request: Request, measures: Sequence[Measure]) -> list[frozenset[int]]:
    if not request.axes or request.whole:
        # A single counterfactual is run whole: what it records may lie anywhere.
        return [frozenset(range(len(prompt))) for prompt in request.bases]
    if not measures:
        raise InputError("a sweep needs something to measure: add a metric, for example logit_diff(' Mary', ' John')")
    return [frozenset(measure.positions[base] for measure in measures) for base in range(len(request.bases))]


def check_request(runtime: Runtime, request: Request) -> None:
    """Refuse, before anything runs, prompts that the model cannot read and metric tokens that it does not have."""
    donors = [prompt for donor in request.donors if donor is not None for prompt in donor.prompts]
    check_ids(runtime, [prompt.token_ids for prompt in (*request.bases, *donors)])
    size = runtime.geometry.vocab_size
    for metric, tokens in zip(request.metrics, request.tokens, strict=True):
        if tokens is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise InputError(
                f"metric {metric.name}: token ids must be in the model's vocabulary (0 to {size - 1}), got {tokens.max()}"
            )


def _position(metric: Metric, prompt: Prompt) -> int:
    positions = prompt.positions(metric.selection)
    if len(positions) != 1:
        raise InputError(
            f"metric {metric.name}: {metric.position!r} selects {len(positions)} positions; a metric reads one"
        )
    return int(positions[0])


def _reference_position(metric: Metric, base: Prompt, donor: Prompt) -> int:
    """Where a metric reads the donor run: an index means the same token only in prompts of one length."""
    selection = metric.selection
    by_index = selection is not None and any(not isinstance(item, str) for item in selection.items)
    if by_index and len(base) != len(donor):
        raise InputError(
            f"metric {metric.name}: position {metric.position!r} is an index, and the donor has {len(donor)} tokens where the base has {len(base)}; "
            "measure at 'last' or at a named span that both have"
        )
    return _position(metric, donor)


def _run_ordinary(
    runtime: Runtime,
    request: Request,
    sites: Sequence[Resolved],
    measures: Sequence[Measure],
    moved: Sequence[tuple[int, ...]] | None,
    path: str,
    budget: Budget,
) -> Ordinary:
    """Bases, donors and references in one batch: each distinct prompt runs once."""
    slots: set[Slot] = set()
    if path == "branch":
        slots |= {(BOUNDARY, layer) for layer in range(runtime.geometry.n_layers + 1)}
    prompts = list(request.bases)
    for item, donor in zip(sites, request.donors or (None,) * len(sites), strict=True):
        if donor is not None:
            prompts += donor.prompts
            slots |= needed_slots(item)
    places = [place for measure in measures for place in zip(request.bases, measure.positions, strict=True)]
    if request.reference is not None and moved is not None:
        prompts += request.reference
        places += [place for positions in moved for place in zip(request.reference, positions, strict=True)]
    longest = max(len(prompt) for prompt in prompts)
    return run_ordinary(
        runtime,
        prompts,
        slots,
        places,
        measures,
        keep_cache=path == "branch",
        max_tokens=longest * budget.plain_rows(runtime, longest),
    )


def _ordinary_metrics(
    request: Request, ordinary: Ordinary, measures: list[Measure], moved: list[tuple[int, ...]] | None
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Every metric on the bases and on the references; fills the reference logits of distances."""
    for number, measure in enumerate(measures):
        if not METRICS[measure.metric.kind].reference:
            continue
        if measure.metric.reference == "base":
            measure.reference = ordinary.logits_at(request.bases, measure.positions)
        elif request.reference is None or moved is None:
            raise InputError(
                f"{measure.metric.name}: there is no donor run to measure the distance from; give reference='base'"
            )
        else:
            measure.reference = ordinary.logits_at(request.reference, moved[number])
    base = [ordinary.measured(measure, request.bases, measure.positions) for measure in measures]
    if request.reference is None or moved is None:
        return base, None
    pairs = zip(measures, moved, strict=True)
    return base, [ordinary.measured(measure, request.reference, positions) for measure, positions in pairs]


# --- branches -------------------------------------------------------------------------------------------------------


class Tally:
    """Numbers of branches as their passes come in."""

    def __init__(self, prepared: Prepared) -> None:
        table = prepared.table
        self.prepared = prepared
        # A pruned branch has the base run's value, exactly.
        bases = [base[table.base] for base in prepared.base]
        self.values = np.stack(bases) if bases else np.zeros((0, len(table)), dtype=np.float32)
        self.fired = [np.zeros(len(table), dtype=np.int64) for _ in prepared.resolved]
        self.squared = [np.zeros(len(table)) for _ in prepared.resolved]

    def add(self, lowered: Lowered, outputs: Outputs) -> None:
        """Put the outputs of one pass in place."""
        table, measures = self.prepared.table, self.prepared.measures
        bases = torch.as_tensor(table.base[lowered.branches])
        restored = unsorted_metrics(outputs["metrics"], bases, lowered.batch, lowered.column)
        for number, (measure, value) in enumerate(zip(measures, restored, strict=True)):
            # A measured position before a branch's first change is the base run's.
            before = np.asarray(measure.positions)[bases] < table.start[lowered.branches]
            self.values[number, lowered.branches] = np.where(before, self.prepared.base[number][bases], value.numpy())
        for (number, owners), norm in zip(lowered.norm_branches, outputs["norms"], strict=True):
            np.add.at(self.fired[number], owners, 1)
            np.add.at(self.squared[number], owners, norm.double().cpu().numpy() ** 2)

    def outcome(self, path: str, reason: str, passes: int) -> Outcome:
        """The result, with receipts; NaN and infinity are reported, not averaged away."""
        prepared, request, table = self.prepared, self.prepared.request, self.prepared.table
        sites = [item for item, _, _ in prepared.resolved]
        receipts = receipts_of([*request.swept, *request.fixed], sites, table, self.fired, self.squared, path, reason)
        moved = [squared for squared, (_, _, moving) in zip(self.squared, prepared.resolved, strict=True) if moving]
        change = np.sqrt(np.sum(moved, axis=0)) if moved else np.zeros(len(table))
        counts = [fired for fired, (_, _, moving) in zip(self.fired, prepared.resolved, strict=True) if moving]
        writes = np.sum(counts, axis=0) if counts else np.zeros(len(table))
        outcome = Outcome(
            grid=prepared.grid,
            swept=tuple(item for item, _, moving in prepared.resolved if moving),
            values=[prepared.grid.scatter(value) for value in self.values],
            base=prepared.base,
            reference=prepared.reference,
            change=prepared.grid.scatter(change),
            fired=prepared.grid.scatter(writes),
            receipts=receipts,
            path=path,
            reason=reason,
            passes=passes,
            branches=len(table.live),
            pruned=int(table.pruned.sum()),
        )
        _report_nonfinite(outcome, request, self.values)
        return outcome


def run_prepared(
    runtime: Runtime, prepared: Prepared, budget: Budget, path: str, reason: str, progress: Progress | None = None
) -> Outcome:
    """Run the branches of a prepared request and put their numbers in place."""
    table, measures, tally = prepared.table, prepared.measures, Tally(prepared)
    work = plan_passes(runtime, table, budget, path)
    done, total = 0, len(table.live)
    for chunk in work:
        lowered = (
            lower_pass(runtime, table, prepared.trunk, measures, chunk)
            if isinstance(chunk, Pass)
            else lower_plain(runtime, table, prepared.trunk, measures, chunk)
        )
        tally.add(lowered, runtime.execute(lowered.program))
        done += len(lowered.branches)
        if progress is not None:
            progress(done, total)
    return tally.outcome(path, reason, len(work))


def plan_passes(runtime: Runtime, table: BranchTable, budget: Budget, path: str) -> list[Pass | Ints]:
    """The passes that run every live branch: packed ones, or batches of whole rows."""
    if path == "branch":
        return list(pack(table, runtime.cost, budget.branch_tokens(runtime, table)))
    live = table.live
    if len(live) == 0:
        return []
    rows = budget.plain_rows(runtime, int(table.end.max()))
    return [live[low : low + rows] for low in range(0, len(live), rows)]


def _report_nonfinite(outcome: Outcome, request: Request, values: np.ndarray) -> None:
    for metric, row in zip(request.metrics, values, strict=True):
        bad = int((~np.isfinite(row)).sum())
        if bad:
            where = ", ".join(str(item.site) for item in (*request.swept, *request.fixed))
            message = f"{metric.name}: {bad} of {len(row)} values are NaN or infinite (sites {where}); they are kept as they are"
            outcome.warnings.append(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
