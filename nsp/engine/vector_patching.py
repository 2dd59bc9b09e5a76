"""Vectors patched into prompts, one in each branch: what follows, the next-token distribution, how likely an answer is.

A branch sets ``resid_post`` of one layer at one position of a target prompt to one vector. Branches of several target
prompts run and decode together, over their prompts' keys and values (see `nsp.engine.generation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Bases, Branches, Ints, Source, Writes
from nsp.engine.budget import Budget
from nsp.engine.forward_pass import check_ids
from nsp.engine.generation import Decoding, prefill, read_head, rows_at_once
from nsp.engine.readout import Measure, chunk_rows
from nsp.engine.runtime import Runtime
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.slots import BOUNDARY
from nsp.engine.trunk import run_bases
from nsp.errors import InputError
from nsp.metrics import Metric


@dataclass(frozen=True, eq=False)
class VectorPatches:
    """What is put where, one patch a branch.

    Attributes:
        targets: the prompts; ``positions`` the one position of each that is written.
        vectors: float tensor with axes (vector, width).
        target, layer, vector: integer arrays with axis (branch): the prompt, the layer whose ``resid_post`` is set, and
            the vector. A branch with ``layer`` -1 is its prompt's run without a patch.
        stream: (branch) the stream of random draws of each branch, by default its number.
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

    def branches(self, runtime: Runtime) -> Branches:
        """The patches as branches of the targets, from which text is generated.

        Raises InputError where the model cannot run them: they decode from their prompts' keys and values.
        """
        check_patched_generation(runtime)
        return self._of(runtime, Bases(self.targets, runtime.geometry.n_layers))

    def answered(self, runtime: Runtime, answers: Sequence[Sequence[int]]) -> Branches:
        """The patches as branches that measure the log-probability, in nats, that their prompts are followed by an answer:
        exact, by teacher forcing, the sum over the answer's tokens.

        ``answers`` are the token ids of one answer for each target prompt.
        """
        lengths = np.array([len(answer) for answer in answers])
        measures = [
            Measure(
                Metric("logprob"),
                torch.tensor([[answer[min(step, len(answer) - 1)]] for answer in answers]),
                tuple(
                    len(prompt) - 1 + min(step, len(answer) - 1)
                    for prompt, answer in zip(self.targets, answers, strict=True)
                ),
                weight=np.where(step < lengths, 1.0, 0.0),
            )
            for step in range(int(lengths.max()))
        ]
        # The answer's last token is predicted and never read.
        prompts = [(*prompt.token_ids, *answer[:-1]) for prompt, answer in zip(self.targets, answers, strict=True)]
        return self._of(runtime, Bases(prompts, runtime.geometry.n_layers, measures))

    def _of(self, runtime: Runtime, bases: Bases) -> Branches:
        check_ids(runtime, bases.run_ids)
        branch = np.flatnonzero(self.layer >= 0)
        vectors = self.vectors.to(runtime.device)
        position = np.asarray(self.positions, dtype=np.int64)[self.target[branch]]
        source = Source(lambda _slot: vectors[:, None, :], branch_run=self.vector)
        layers = self.layer[branch] + 1
        writes = Writes(BOUNDARY, "set", 1, branch, layers, position, np.zeros_like(branch), source)
        return Branches(bases, np.asarray(self.target, dtype=np.int64), [writes], streams=self.stream)


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


def check_patched_generation(runtime: Runtime) -> None:
    """InputError where the model cannot run patched branches: they decode from their prompts' keys and values."""
    ensure_checked(runtime)
    if runtime.branch_refusal:
        raise InputError(f"patched generation needs the branch path, which cannot run here: {runtime.branch_refusal}")


def next_tokens_of(runtime: Runtime, branches: Branches, tokens: Ints, top: int, budget: Budget) -> NextTokens:
    """The distribution of the first token after each branch's prompt.

    ``tokens`` are the wanted tokens of each branch, (branch, token), -1 for none (NaN, rank -1).
    """
    parts: list[NextTokens] = []
    for chunk, hidden in final_residuals(runtime, branches, budget):
        wanted = tokens[chunk]
        parts += [summarised(runtime, logits, wanted[rows], top) for rows, logits in head_logits(runtime, hidden)]
    return joined(parts)


def final_residuals(
    runtime: Runtime, branches: Branches, budget: Budget, multiple: int = 1
) -> Iterator[tuple[Ints, torch.Tensor]]:
    """The final residual at each branch's last prompt token, (row, width), with the branches' numbers, a block at a time.

    A block holds a multiple of ``multiple`` branches.
    """
    run_bases(runtime, branches.bases, budget)
    rows = max(1, rows_at_once(runtime, branches, Decoding(max_new_tokens=1), budget) // multiple) * multiple
    for low in range(0, len(branches), rows):
        chunk = np.arange(low, min(low + rows, len(branches)))
        yield chunk, prefill(runtime, branches, chunk).hidden


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
    found = [entropy, logprob, torch.where(logprob == logprob, rank, -1), best.indices, best.values.exp()]
    return NextTokens(*(value.cpu().numpy() for value in runtime.fetch(found)))


def joined(parts: Sequence[NextTokens]) -> NextTokens:
    """Rows of several summaries, one after another."""
    return NextTokens(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("entropy", "logprob", "rank", "top", "top_prob")
        )
    )
