"""From a request to its branches: selectors resolved, sources of values found, exact zeros pruned. Nothing runs."""

from __future__ import annotations

import numpy as np

from nsp.datasets.alignment import align
from nsp.engine.branches import Bases, Branches, Ints, Writes
from nsp.engine.forward_pass import check_ids
from nsp.engine.lowering import cells_of, resolve, write_columns
from nsp.engine.operands import make_operand, needed_slots, prompt_source
from nsp.engine.request import Request, check_request, continuations, followed, request_measures
from nsp.engine.runtime import Runtime
from nsp.errors import InputError

ONE_COUNTERFACTUAL = "one counterfactual: a single full forward pass"


def choose_path(runtime: Runtime, request: Request, *, further: bool = False) -> tuple[str, str]:
    """Which path runs, and why. What text is generated from, or ``further`` branches start from, takes the branch path."""
    if not request.axes and request.metrics and not further:
        return "plain", ONE_COUNTERFACTUAL
    if request.path == "plain":
        return "plain", "asked for" if request.axes else ONE_COUNTERFACTUAL
    refusal = runtime.branch_refusal
    switch = runtime.rotary_switch
    if not refusal and switch is not None and max(map(len, request.bases)) > switch.length:
        refusal = f"beyond {switch.length} tokens the model's rotary frequencies depend on where a text ends"
    if request.path == "branch":
        if refusal:
            raise InputError(f"the branch path cannot run here: {refusal}")
        return "branch", "asked for"
    if refusal:
        return "plain", refusal
    return "branch", "attention is causal and the self-check passed"


def plan(runtime: Runtime, request: Request, *, further: bool = False) -> Branches:
    """The branches of a request: one for each cell of its sweep and base, or one for each base where nothing is swept."""
    check_request(runtime, request)
    path, reason = choose_path(runtime, request, further=further)
    stated = (*request.swept, *request.fixed)
    sites = [resolve(runtime, intervention.site, request.bases) for intervention in stated]
    cells = cells_of(sites[: len(request.swept)], request.axes, len(request.bases))
    donors = [request.donors(intervention) for intervention in stated]
    measures, reference_positions = request_measures(request)
    tails = continuations(request)
    whole = not request.axes or not request.metrics
    bases = Bases(
        followed(request.bases, tails),
        runtime.geometry.n_layers,
        measures,
        None if request.reference is None else followed(request.reference, tails),
        reference_positions,
        [prompt for given in donors if given is not None for prompt in followed(given, tails)],
        frozenset().union(*(needed_slots(site) for site, given in zip(sites, donors, strict=True) if given is not None)),
        request.carried,
        path,
        reason,
    )
    check_ids(runtime, bases.run_ids)
    writes, alone = [], []
    for number, (intervention, site, given) in enumerate(zip(stated, sites, donors, strict=True)):
        source, shared = None, None
        if given is not None:
            pairs = zip(request.bases, given, strict=True)
            aligned = [align(base, donor, site.site.positions) for base, donor in pairs]
            if site.slot_component == "pattern" and any(one.base_length != one.donor_length for one in aligned):
                raise InputError(
                    f"{site.site}: a pattern spans all key positions, so donor and base must have equally many tokens"
                )
            source = prompt_source(bases, followed(given, tails), aligned)
            shared = np.array([alignment.shared_prefix for alignment in aligned])
        operand = make_operand(runtime, intervention, site, request.bases, source)
        moving = number < len(request.swept)
        columns = write_columns(site, operand, cells, moving=moving, cumulative=request.cumulative)
        if shared is not None and len(stated) == 1 and not whole:
            columns = _differing(columns, shared, cells.base)
        writes.append(columns)
        if request.axes and request.metrics and not moving:
            alone.append(write_columns(site, operand, cells_of((), (), len(bases)), moving=False))
    every = np.arange(len(bases))
    return Branches(
        bases,
        cells.base,
        writes,
        cells,
        tuple((item, site, number < len(request.swept)) for number, (item, site) in enumerate(zip(stated, sites, strict=True))),
        whole,
        Branches(bases, every, alone, whole=True) if alone else None,
    )


def _differing(writes: Writes, shared: Ints, base: Ints) -> Writes:
    """The writes of a patch less those where donor and base share every token up to there: attention is causal, so the
    values are equal.
    """
    return writes.where(writes.position >= shared[base[writes.branch]])
