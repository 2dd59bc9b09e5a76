"""The same interventions at several strengths: one branch for each prompt and multiplier, decoded together.

A multiplier multiplies the factor of a ``scale`` and the coefficient of an ``inject``. Where that changes nothing (a
factor of 1, a coefficient of 0) nothing is written, so that branch is the run without interventions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import BranchTable, Ints, Source, Writes
from nsp.engine.budget import Budget
from nsp.engine.forward_pass import check_ids
from nsp.engine.generation import Decoding, When, generate_branches, prefill, read_head, rows_at_once
from nsp.engine.lowering import Grid, Resolved, resolve, write_columns
from nsp.engine.operands import make_operand
from nsp.engine.recording import Recording, record_trunk
from nsp.engine.runtime import Runtime
from nsp.engine.schedule import Estimate, speed
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.slots import Slot
from nsp.errors import InputError
from nsp.interventions import Inject, Intervention, Patch, Scale

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Strengths:
    """Prompts under the same interventions at several multipliers.

    Attributes:
        prompts, multipliers: branch ``p * len(multipliers) + m`` is prompt p at multiplier m.
        table: the branches; ``trunk`` the prompts' ordinary runs.
        fired: writes on the prompt, axes (prompt, multiplier); 0 where the multiplier changes nothing.
    """

    prompts: tuple[Prompt, ...]
    multipliers: tuple[float, ...]
    table: BranchTable
    trunk: Recording
    fired: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(prompts, multipliers)."""
        return len(self.prompts), len(self.multipliers)


def prepare_strengths(
    runtime: Runtime, prompts: Sequence[Prompt], interventions: Sequence[Intervention], multipliers: Sequence[float]
) -> Strengths:
    """Resolve the interventions on the prompts, and run the prompts once (see `check_strengths` for what can be wrong)."""
    resolved = check_strengths(runtime, prompts, interventions)
    n_layers = runtime.geometry.n_layers
    count = len(multipliers)
    grid = Grid((), tuple((count, 1, 1) for _ in prompts))
    numbers = np.tile(np.arange(count), len(prompts))
    writes = [
        _writes(runtime, item, site, prompts, grid, np.asarray(multipliers), numbers)
        for item, site in zip(interventions, resolved, strict=True)
    ]
    base = np.repeat(np.arange(len(prompts)), count)
    end = np.array([len(prompt) for prompt in prompts])[base]
    table = BranchTable(base, end, n_layers, writes)
    fired = np.zeros(len(table), dtype=np.int64)
    for made in table.writes:
        np.add.at(fired, made.branch, 1)
    trunk = record_trunk(runtime, prompts)
    return Strengths(tuple(prompts), tuple(map(float, multipliers)), table, trunk, fired.reshape(len(prompts), count))


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
    longest, limit = max(len(prompt) for prompt in prompts), runtime.longest_prompt
    if limit is not None and longest + steps > limit:
        raise InputError(f"a prompt of {longest} tokens cannot be continued by {steps}; the model reads at most {limit}")
    resolved = []
    for item in interventions:
        if not isinstance(item, Scale | Inject) or (isinstance(item, Inject) and item.mode == "set"):
            raise InputError(f"{item.op} {item.site}: only what scales or adds has a strength to multiply")
        found = resolve(runtime, item.site, prompts)
        if found.slot_component == "pattern":
            raise InputError("the attention pattern cannot be steered: a generated token has none yet")
        resolved.append(found)
    return resolved


def generate_strengths(
    runtime: Runtime,
    strengths: Strengths,
    decoding: Decoding,
    budget: Budget,
    *,
    when: When = "both",
    progress: Progress | None = None,
) -> np.ndarray:
    """Generated token ids with axes (prompt, multiplier, step), -1 after the end of a text.

    All multipliers of a prompt draw the same numbers, so sampled texts differ by the intervention alone.
    """
    table = strengths.table
    tokens = generate_branches(
        runtime, strengths.trunk, table, decoding, budget, when=when, streams=table.base, progress=progress
    )
    return tokens.reshape(*strengths.shape, -1)


def next_logits(runtime: Runtime, strengths: Strengths, budget: Budget) -> Iterator[tuple[Ints, torch.Tensor]]:
    """The logits after each prompt under each multiplier, in chunks: (branches, float32 logits (branch, token)).

    A chunk holds whole prompts: all multipliers of each.
    """
    table = strengths.table
    count = strengths.shape[1]
    rows = max(1, rows_at_once(runtime, strengths.trunk, Decoding(1), budget) // count) * count
    for low in range(0, len(table), rows):
        chunk = np.arange(low, min(low + rows, len(table)))
        logits = read_head(runtime, prefill(runtime, strengths.trunk, table, chunk).hidden)["logits"]
        assert logits is not None
        yield chunk, logits


def _writes(
    runtime: Runtime,
    intervention: Intervention,
    item: Resolved,
    prompts: Sequence[Prompt],
    grid: Grid,
    multipliers: np.ndarray,
    numbers: Ints,
) -> Writes:
    """One intervention's writes in every branch, each with the value of its branch's multiplier."""
    operand = make_operand(runtime, intervention, item, prompts, _no_donor)
    found = write_columns(item, operand, grid, len(prompts), moving=False)
    strengths = torch.tensor(multipliers * operand.factor, dtype=torch.float32, device=runtime.device)
    source = operand.source

    def values(slot: Slot) -> torch.Tensor:
        each = strengths[:, None, None]
        return each.expand(-1, 1, item.rows) if source is None else each * source.values(slot).float()

    idle = 1.0 if source is None else 0.0
    acting = multipliers * operand.factor != idle
    position = None if source is None else source.position
    steered = replace(found, source=Source(values, None, position, numbers), factor=1.0)
    return steered.where(acting[numbers[steered.branch]])


def _no_donor(_patch: Patch, _site: object) -> tuple[Source, None]:
    raise InputError("a patch has no strength to multiply")


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
