"""How likely the model itself finds given tokens: log-probabilities of texts that follow prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.forward_pass import check_ids
from nsp.engine.program import MetricStep, Readout
from nsp.engine.readout import readout_at
from nsp.engine.recording import record
from nsp.engine.runtime import Runtime


def continuation_logprobs(
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    fixed: FixedInterventions | None = None,
    max_tokens: int = 4096,
) -> list[np.ndarray]:
    """Log-probability, in nats, of every token of each continuation given its prompt and the tokens before it.

    One array with axis (step,) per continuation, empty for an empty one. Forward passes in batches of at most
    ``max_tokens`` columns, ordinary ones unless the run has interventions of its own (``fixed``).
    """
    whole = [[*prompt, *rest] for prompt, rest in zip(prompts, continuations, strict=True)]
    logprobs = [np.zeros(0) for _ in whole]
    # Rows of like length run together; nothing depends on the order.
    order = sorted((row for row in range(len(whole)) if continuations[row]), key=lambda row: -len(whole[row]))
    check_ids(runtime, [whole[row] for row in order])
    low = 0
    while low < len(order):
        batch = order[low : low + max(1, max_tokens // len(whole[order[low]]))]
        low += len(batch)
        texts = [Prompt.from_ids(whole[row]) for row in batch]
        writes = () if fixed is None else fixed.writes(texts)
        readout = _readout(runtime, batch, prompts, continuations)
        values = record(runtime, texts, writes=writes, readout=readout).metrics[0].double().cpu().numpy()
        cuts = np.cumsum([len(continuations[row]) for row in batch])[:-1]
        for row, part in zip(batch, np.split(values, cuts), strict=True):
            logprobs[row] = part
    return logprobs


def _readout(
    runtime: Runtime, batch: Sequence[int], prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> Readout:
    rows = [number for number, row in enumerate(batch) for _ in continuations[row]]
    columns = [len(prompts[row]) - 1 + step for row in batch for step in range(len(continuations[row]))]
    tokens = [[token] for row in batch for token in continuations[row]]
    step: MetricStep = {
        "kind": "logprob",
        "tokens": torch.tensor(tokens, device=runtime.device),
        "reference": None,
        "reference_row": None,
        "select": None,
    }
    return readout_at(runtime, torch.tensor(rows), torch.tensor(columns), metrics=[step])
