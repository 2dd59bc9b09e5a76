"""The same interventions at several strengths: one branch for each prompt and multiplier, decoded together.

A multiplier multiplies the factor of a ``scale`` and the coefficient of an ``inject``. Where that changes nothing (a
factor of 1, a coefficient of 0) nothing is written, so that branch is the run without interventions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Bases, Branches, Cells, Ints, Source, Writes
from nsp.engine.budget import Budget
from nsp.engine.estimates import Estimate, speed
from nsp.engine.forward_pass import check_continuation, check_ids
from nsp.engine.generation import read_head
from nsp.engine.lowering import Resolved, resolve, write_columns
from nsp.engine.operands import make_operand
from nsp.engine.runtime import Runtime
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.slots import Slot
from nsp.engine.vector_patching import final_residuals
from nsp.errors import InputError
from nsp.interventions import Inject, Intervention, Scale


def strength_branches(
    runtime: Runtime, prompts: Sequence[Prompt], interventions: Sequence[Intervention], multipliers: Sequence[float]
) -> Branches:
    """Prompts under the same interventions at several multipliers: branch ``p * len(multipliers) + m`` is prompt p at
    multiplier m (see `check_strengths` for what can be wrong).

    Text generated from them has axes (prompt, multiplier, 1, 1, step). All multipliers of a prompt draw the same numbers,
    so sampled texts differ by the intervention alone.
    """
    resolved = check_strengths(runtime, prompts, interventions)
    cells = Cells((), ((len(multipliers), 1, 1),) * len(prompts))
    numbers = np.tile(np.arange(len(multipliers)), len(prompts))
    writes = [
        _writes(runtime, item, site, prompts, cells, np.asarray(multipliers), numbers)
        for item, site in zip(interventions, resolved, strict=True)
    ]
    return Branches(Bases(prompts, runtime.geometry.n_layers), cells.base, writes, cells, streams=cells.base)


def write_counts(branches: Branches) -> Ints:
    """Writes on the prompt, (prompt, multiplier); 0 where the multiplier changes nothing."""
    counts = sum((np.bincount(writes.branch, minlength=len(branches)) for writes in branches.writes), np.zeros(len(branches), np.int64))
    return np.asarray(counts.reshape(len(branches.bases), -1))


def check_strengths(
    runtime: Runtime, prompts: Sequence[Prompt], interventions: Sequence[Intervention], *, steps: int = 0
) -> list[Resolved]:
    """The interventions' sites on the prompts, before anything runs.

    Raises InputError for an intervention that a multiplier has no meaning for, for prompts that the model cannot read
    or continue by ``steps`` tokens, and where the model's keys and values cannot be shared (branches decode from those
    of their prompt).
    """
    ensure_checked(runtime)
    if runtime.branch_refusal:
        raise InputError(f"steering needs the branch path, which cannot run here: {runtime.branch_refusal}")
    check_ids(runtime, [prompt.token_ids for prompt in prompts])
    check_continuation(runtime, max(map(len, prompts)), steps)
    resolved = []
    for item in interventions:
        if not isinstance(item, Scale | Inject) or (isinstance(item, Inject) and item.mode == "set"):
            raise InputError(f"{item.op} {item.site}: only what scales or adds has a strength to multiply")
        if item.site.component == "pattern":
            raise InputError("the attention pattern cannot be steered: a generated token has none yet")
        resolved.append(resolve(runtime, item.site, prompts))
    return resolved


def next_logits(runtime: Runtime, branches: Branches, budget: Budget) -> Iterator[tuple[Ints, torch.Tensor]]:
    """The logits after each prompt under each multiplier, in chunks: (branches, float32 logits (branch, token)).

    A chunk holds whole prompts: all multipliers of each.
    """
    for chunk, hidden in final_residuals(runtime, branches, budget, len(branches) // len(branches.bases)):
        logits = read_head(runtime, hidden)["logits"]
        assert logits is not None
        yield chunk, logits


def _writes(
    runtime: Runtime,
    intervention: Intervention,
    item: Resolved,
    prompts: Sequence[Prompt],
    cells: Cells,
    multipliers: np.ndarray,
    numbers: Ints,
) -> Writes:
    """One intervention's writes in every branch, each with the value of its branch's multiplier."""
    operand = make_operand(runtime, intervention, item, prompts)
    columns = write_columns(item, operand, cells, moving=False)
    strengths = torch.tensor(multipliers * operand.factor, dtype=torch.float32, device=runtime.device)
    source = operand.source

    def values(slot: Slot) -> torch.Tensor:
        each = strengths[:, None, None]
        return each.expand(-1, 1, item.rows) if source is None else each * source.values(slot).float()

    idle = 1.0 if source is None else 0.0
    acting = multipliers * operand.factor != idle
    position = None if source is None else source.position
    steered = replace(columns, source=Source(values, None, position, numbers), factor=1.0)
    return steered.where(acting[numbers[steered.branch]])


def estimate_strengths(
    runtime: Runtime, prompts: Sequence[Prompt], multipliers: int, steps: int, title: str
) -> Estimate:
    """The cost of every prompt at every multiplier, with ``steps`` generated tokens each."""
    cost, n_layers = runtime.cost, runtime.geometry.n_layers
    lengths = np.array([len(prompt) for prompt in prompts])
    branches = len(prompts) * multipliers
    columns = int(lengths.sum()) * multipliers + branches * steps
    flop = sum(cost.rows(1 + multipliers, int(length), 0) for length in lengths)
    flop += sum(cost.rows(multipliers, 1, int(length) + steps // 2) for length in lengths) * steps
    geometry = runtime.geometry
    kept = 2 * geometry.n_kv_heads * geometry.head_dim * int(lengths.max() + steps) * runtime.dtype.itemsize
    return Estimate(
        title, "branch", "branches decode together over their prompt's keys and values", branches, 0, 1 + steps, columns,
        columns * n_layers, columns * n_layers, columns * n_layers * cost.per_token, flop * n_layers,
        flop * n_layers / speed(str(runtime.device), runtime.dtype), branches * kept * n_layers,
    )  # fmt: skip
