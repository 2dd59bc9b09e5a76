"""Vectors put into prompts, one a cell: texts, the next-token distribution, and how likely an expected answer is.

A cell sets ``resid_post`` of one layer at one position of a target prompt to one vector. Cells of several target
prompts run and decode together, over their prompts' keys and values (see `nsp.engine.generation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import BranchTable, Ints, Source, Writes
from nsp.engine.budget import Budget
from nsp.engine.forward_pass import check_ids
from nsp.engine.generation import Decoding, generate_branches, prefill, read_head, rows_at_once
from nsp.engine.pack import pack
from nsp.engine.passes import lower_pass
from nsp.engine.readout import Measure, chunk_rows
from nsp.engine.recording import Recording, record_trunk
from nsp.engine.runtime import Runtime
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.slots import BOUNDARY
from nsp.errors import InputError
from nsp.metrics import Metric

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Cells:
    """What is put where.

    Attributes:
        targets: the prompts; ``positions`` the one position of each that is written.
        vectors: float tensor with axes (vector, width).
        target, layer, vector: integer arrays with axis (cell): the prompt, the layer whose ``resid_post`` is set, and
            the vector. A cell with ``layer`` -1 is its prompt's run without a patch.
        stream: (cell) the stream of random draws of each cell, by default its number.
    """

    targets: tuple[Prompt, ...]
    positions: tuple[int, ...]
    vectors: torch.Tensor
    target: Ints
    layer: Ints
    vector: Ints
    stream: Ints | None = None

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True, eq=False)
class NextTokens:
    """The next-token distribution of each cell, from float64 softmax.

    Attributes:
        entropy: nats, (cell). ``logprob`` of the wanted tokens, (cell, token); ``rank`` of each, 0 the most likely.
        top: the most likely tokens' ids, (cell, place), with ``top_prob``.
    """

    entropy: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    top: Ints
    top_prob: np.ndarray


def check_implant(runtime: Runtime) -> None:
    """InputError where the model cannot run cells: they decode from their prompts' keys and values."""
    ensure_checked(runtime)
    if runtime.branch_refusal:
        raise InputError(f"patched generation needs the branch path, which cannot run here: {runtime.branch_refusal}")


def generate_cells(
    runtime: Runtime, cells: Cells, decoding: Decoding, budget: Budget, progress: Progress | None = None
) -> Ints:
    """Generated token ids of every cell, with axes (cell, step); -1 after the end of a text."""
    trunk, table = _run_targets(runtime, cells, [prompt.token_ids for prompt in cells.targets])
    return generate_branches(runtime, trunk, table, decoding, budget, streams=cells.stream, progress=progress)


def next_tokens_of(runtime: Runtime, cells: Cells, tokens: Ints, top: int, budget: Budget) -> NextTokens:
    """The distribution of the first token after each cell's prompt.

    ``tokens`` are the wanted tokens of each cell, (cell, token), -1 for none (NaN, rank -1).
    """
    parts: list[NextTokens] = []
    for chunk, hidden in final_residuals(runtime, cells, budget):
        wanted = tokens[chunk]
        parts += [summarised(runtime, logits, wanted[rows], top) for rows, logits in head_logits(runtime, hidden)]
    return joined(parts)


def final_residuals(runtime: Runtime, cells: Cells, budget: Budget) -> Iterator[tuple[Ints, torch.Tensor]]:
    """The final residual at each cell's last prompt token, (row, width), with the cells' numbers, a block at a time."""
    trunk, table = _run_targets(runtime, cells, [prompt.token_ids for prompt in cells.targets])
    rows = rows_at_once(runtime, trunk, Decoding(max_new_tokens=1), budget)
    for low in range(0, len(cells), rows):
        chunk = np.arange(low, min(low + rows, len(cells)))
        yield chunk, prefill(runtime, trunk, table, chunk).hidden


def head_logits(runtime: Runtime, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Float32 logits (row, token) of residual vectors with axes (row, width), a memory-sized block of rows at a time."""
    block = chunk_rows(runtime.geometry.vocab_size)
    for low in range(0, len(hidden), block):
        rows = slice(low, min(low + block, len(hidden)))
        logits = read_head(runtime, hidden[rows])["logits"]
        assert logits is not None
        yield rows, logits


def summarised(runtime: Runtime, logits: torch.Tensor, tokens: Ints, top: int) -> NextTokens:
    """`NextTokens` of float32 logits with axes (row, token)."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    wanted = torch.as_tensor(np.maximum(tokens, 0), device=logits.device)
    given = torch.as_tensor(tokens >= 0, device=logits.device)
    logprob = log_p.gather(1, wanted).masked_fill(~given, float("nan"))
    rank = torch.stack([(log_p > log_p.gather(1, wanted[:, one : one + 1])).sum(1) for one in range(tokens.shape[1])], 1) \
        if tokens.shape[1] else wanted  # fmt: skip
    best = log_p.topk(min(top, log_p.shape[1]), dim=1)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    found = [entropy, logprob, rank.masked_fill(~given, -1), best.indices, best.values.exp()]
    return NextTokens(*(value.cpu().numpy() for value in runtime.fetch(found)))


def joined(parts: Sequence[NextTokens]) -> NextTokens:
    """Rows of several summaries, one after another."""
    return NextTokens(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("entropy", "logprob", "rank", "top", "top_prob")
        )
    )


def score_cells(runtime: Runtime, cells: Cells, answers: Sequence[Sequence[int]], budget: Budget) -> np.ndarray:
    """Log-probability, in nats, that each cell's prompt is followed by an answer: exact, by teacher forcing.

    ``answers`` are the token ids of one answer a target prompt. Returns the sum over the answer's tokens, (cell).
    Every cell must be patched (``layer`` 0 or more).
    """
    assert bool((cells.layer >= 0).all()), "an unpatched run is scored by nsp.engine.scoring"
    whole = [(*prompt.token_ids, *answer) for prompt, answer in zip(cells.targets, answers, strict=True)]
    # The answer's last token is predicted and never read.
    trunk, table = _run_targets(runtime, cells, [ids[:-1] for ids in whole])
    longest = max(len(answer) for answer in answers)
    lengths = np.array([len(answer) for answer in answers])
    measures = [
        Measure(
            Metric("logprob"),
            torch.tensor([[answer[min(step, len(answer) - 1)]] for answer in answers], device=runtime.device),
            tuple(
                len(prompt) - 1 + min(step, len(answer) - 1)
                for prompt, answer in zip(cells.targets, answers, strict=True)
            ),
        )
        for step in range(longest)
    ]
    total = np.zeros(len(cells))
    for made in pack(table, runtime.cost, budget.branch_tokens(runtime, table)):
        lowered = lower_pass(runtime, table, trunk, measures, made)
        outputs = runtime.execute(lowered.program)
        for step, values in enumerate(outputs["metrics"]):
            counts = lengths[table.base[lowered.branches]] > step
            total[lowered.branches] += np.where(counts, values.double().cpu().numpy(), 0.0)
    return total


def _run_targets(runtime: Runtime, cells: Cells, prompts: Sequence[Sequence[int]]) -> tuple[Recording, BranchTable]:
    """The prompts' ordinary runs, and the cells as branches of them."""
    check_ids(runtime, prompts)
    n_layers = runtime.geometry.n_layers
    trunk = record_trunk(runtime, prompts)
    branch = np.flatnonzero(cells.layer >= 0)
    vectors = cells.vectors.to(runtime.device)
    position = np.asarray(cells.positions, dtype=np.int64)[cells.target[branch]]
    writes = Writes(
        BOUNDARY, "set", 1, branch, cells.layer[branch] + 1, position, np.zeros_like(branch),
        Source(lambda _slot: vectors[:, None, :], branch_run=cells.vector),
    )  # fmt: skip
    end = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    return trunk, BranchTable(np.asarray(cells.target, dtype=np.int64), end[cells.target], n_layers, [writes])
