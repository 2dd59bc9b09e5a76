"""The runs of causal tracing: facts with noisy subjects as trunks, and one branch for each state restored.

One *row* is one fact under one draw of noise. The corrupted run of a row is the trunk of its branches, so a branch that
restores layer l at position p runs from there on and reuses everything that the noise alone decides. On models without
the branch path every branch carries noise and restoration through a full pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nsp.datasets.facts import EncodedFact
from nsp.datasets.prompts import Prompt
from nsp.datasets.tokens import single_token
from nsp.engine.branches import BranchTable, Ints, Source, Writes, drop_unfelt
from nsp.engine.budget import Budget
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.outcome import Numbers
from nsp.engine.readout import Measure, combined
from nsp.engine.recording import Recording, record
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot, slot_of
from nsp.engine.sweep import Progress, Request, prepare, run_branches
from nsp.interventions import Noise, inject
from nsp.metrics import METRICS, Metric
from nsp.sites import Selection


@dataclass(frozen=True)
class Restored:
    """What is restored, one branch a layer and position.

    Attributes:
        component: ``resid_post``, ``attn_out`` or ``mlp_out``.
        layers: the layers, or the centres of windows of ``window`` layers.
        positions: the positions selected in each fact; None: all.
    """

    component: str
    layers: tuple[int, ...]
    window: int
    positions: Selection | None

    def around(self, layer: int, having: Sequence[int]) -> list[int]:
        """The layers of the window centred on one, clipped at the ends: [layer - w // 2, layer + w - w // 2)."""
        low = layer - self.window // 2
        return [number for number in range(low, low + self.window) if number in having]


@dataclass(frozen=True, eq=False)
class Rows:
    """Facts under draws of noise: row ``fact * draws + draw``.

    Attributes:
        seeds: of the noise, axes (fact, draw); ``scale`` its standard deviation in units of the embedding's.
    """

    facts: tuple[EncodedFact, ...]
    seeds: np.ndarray
    scale: float

    @property
    def draws(self) -> int:
        return int(self.seeds.shape[1])

    @property
    def prompts(self) -> list[Prompt]:
        """One prompt a row."""
        return [fact.prompt for fact in self.facts for _ in range(self.draws)]

    def positions(self, selection: Selection | None) -> list[tuple[int, ...]]:
        """The selected positions of each row."""
        return [prompt.positions(selection) for prompt in self.prompts]


@dataclass(frozen=True, eq=False)
class Traced:
    """Values of one restored component, axes (metric, fact, draw, layer, position); NaN where a fact has no such cell."""

    values: np.ndarray
    change: np.ndarray  # (fact, draw, layer, position)
    fired: np.ndarray


def noise_writes(runtime: Runtime, rows: Rows) -> Writes:
    """The noise at every row's subject, ``branch`` being the row: what ``inject("embed @ subject", Noise(...))`` adds."""
    values, columns = [], []
    for row, (prompt, seed) in enumerate(zip(rows.prompts, rows.seeds.reshape(-1), strict=True)):
        statement = inject("embed @ subject", Noise(rows.scale, int(seed)))
        made = FixedInterventions.of(runtime, [statement], [prompt]).writes([prompt])[0]
        assert made.source is not None
        values.append(made.source.values((BOUNDARY, 0))[0])
        columns.append(np.stack([np.full(len(made), row), made.position]))
    longest = max(len(value) for value in values)
    stacked = torch.stack([torch.nn.functional.pad(value, (0, 0, 0, longest - len(value))) for value in values])
    branch, position = np.concatenate(columns, axis=1).astype(np.int64)
    nothing = np.zeros_like(branch)
    source = Source(lambda _slot: stacked, run=np.arange(len(values)))
    return Writes(BOUNDARY, "add", 1, branch, nothing, position, nothing, source, name="embed @ subject")


def restore_writes(
    runtime: Runtime, rows: Rows, what: Restored, clean: Recording | None
) -> tuple[Writes, Ints, list[tuple[int, ...]]]:
    """The clean values written by every branch, the row of each branch, and the positions of each row.

    The branches of a row are in the order (layer, position). Tokens before the subject never see the noise, so nothing is
    written there.
    """
    geometry = runtime.geometry
    positions = rows.positions(what.positions)
    having = geometry.layers_of(what.component)
    windows = [what.around(layer, having) for layer in what.layers]
    reach = np.array([len(window) for window in windows])
    flat = np.array([slot_of(what.component, layer)[1] for window in windows for layer in window])
    branches, layers, places, owners, first = [], [], [], [], 0
    for row, (prompt, chosen) in enumerate(zip(rows.prompts, positions, strict=True)):
        at = np.asarray(chosen, dtype=np.int64)
        cells = np.arange(len(windows) * len(at)).reshape(len(windows), len(at))
        branch = np.repeat(cells, reach, axis=0)  # (write layer, position)
        layer = np.broadcast_to(flat[:, None], branch.shape)
        place = np.broadcast_to(at[None, :], branch.shape)
        kept = place >= prompt.span("subject")[0]
        branches.append(first + branch[kept])
        layers.append(layer[kept])
        places.append(place[kept])
        owners.append(np.full(cells.size, row))
        first += cells.size
    branch_of, layer_of, place_of = (np.concatenate(part).astype(np.int64) for part in (branches, layers, places))
    fact_of = np.arange(len(rows.prompts)) // rows.draws
    source = Source(lambda slot: _clean_value(clean, slot), run=fact_of)
    component = slot_of(what.component, 0)[0]
    unit = np.zeros_like(branch_of)
    writes = Writes(component, "set", 1, branch_of, layer_of, place_of, unit, source, name=what.component)
    return writes, np.concatenate(owners).astype(np.int64), positions


def _clean_value(clean: Recording | None, slot: Slot) -> torch.Tensor:
    assert clean is not None  # a table for an estimate is never run
    return clean.values[slot]


def restore_table(
    runtime: Runtime, rows: Rows, what: Restored, measured: Sequence[frozenset[int]], clean: Recording | None, path: str
) -> tuple[BranchTable, list[tuple[int, ...]]]:
    """The branches of one component, and the positions of each row. On the plain path each carries its noise too."""
    writes, base, positions = restore_writes(runtime, rows, what, clean)
    writes = drop_unfelt(writes, runtime.geometry.n_layers, list(measured), base)
    end = np.array([max(row) + 1 for row in measured], dtype=np.int64)[base]
    stated = [writes]
    if path == "plain":
        stated = [_in_every_branch(noise_writes(runtime, rows), base), writes]
    return BranchTable(base, end, runtime.geometry.n_layers, stated), positions


def _in_every_branch(noise: Writes, base: Ints) -> Writes:
    """Writes by row as writes by branch."""
    own = [np.flatnonzero(noise.branch == row) for row in range(int(base.max()) + 1)]
    index = np.concatenate([own[row] for row in base])
    branch = np.repeat(np.arange(len(base)), [len(own[row]) for row in base])
    return replace(noise, branch=branch, layer=noise.layer[index], position=noise.position[index], unit=noise.unit[index])


class CorruptedRuns:
    """The clean and corrupted runs of some facts, and counterfactuals that restore clean states.

    Attributes:
        clean, corrupted: the metrics without restoration, axes (metric, fact) and (metric, fact, draw).
    """

    def __init__(
        self,
        runtime: Runtime,
        rows: Rows,
        metrics: Sequence[Metric],
        components: Sequence[str],
        budget: Budget,
    ) -> None:
        self.runtime, self.rows, self.budget = runtime, rows, budget
        self.path = "plain" if runtime.branch_refusal else "branch"
        prompts = rows.prompts
        answers = torch.tensor([[fact.answer] for fact in rows.facts for _ in range(rows.draws)])
        tokens = tuple(_tokens_of(runtime, metric, answers) for metric in metrics)
        request = Request(tuple(prompts), (), tuple(metrics), tokens, reference=tuple(prompts))
        prepared = prepare(runtime, request, "plain", budget)
        self.measures: list[Measure] = prepared.measures
        self.measured = [frozenset(measure.positions[row] for measure in self.measures) for row in range(len(prompts))]
        noise = noise_writes(runtime, rows)
        length = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        alone = BranchTable(np.arange(len(prompts)), length, runtime.geometry.n_layers, [noise])
        numbers = Numbers(alone, self.measures, prepared.base)
        run_branches(runtime, numbers, prepared.trunk, budget, "plain")
        self._base = list(numbers.values)  # by measure, axis (row)
        every = np.arange(len(prompts))
        clean = np.stack(combined(self.measures, prepared.base, every))
        self.clean = clean.reshape(len(metrics), -1, rows.draws)[..., 0]
        self.corrupted = np.stack(combined(self.measures, self._base, every)).reshape(len(metrics), -1, rows.draws)
        self._donor = self._clean_run(components)
        self._trunk = prepared.trunk if self.path == "plain" else self._corrupted_run(noise)

    def _clean_run(self, components: Sequence[str]) -> Recording:
        geometry = self.runtime.geometry
        slots = {slot_of(name, layer) for name in components for layer in geometry.layers_of(name)}
        ids = [fact.prompt.token_ids for fact in self.rows.facts]
        longest = max(map(len, ids))
        return record(self.runtime, ids, slots, max_tokens=longest * self.budget.plain_rows(self.runtime, longest))

    def _corrupted_run(self, noise: Writes) -> Recording:
        boundaries = {(BOUNDARY, layer) for layer in range(self.runtime.geometry.n_layers + 1)}
        return record(
            self.runtime, self.rows.prompts, boundaries, writes=[noise], keep_cache=True, max_tokens=0, stay=True
        )

    def restore(self, what: Restored, progress: Progress | None = None) -> Traced:
        """Every state of ``what`` restored, one counterfactual a row, layer and position."""
        table, positions = restore_table(self.runtime, self.rows, what, self.measured, self._donor, self.path)
        numbers = Numbers(table, self.measures, self._base)
        run_branches(self.runtime, numbers, self._trunk, self.budget, self.path, progress)
        values = combined(self.measures, list(numbers.values), table.base)
        change, fired = np.sqrt(numbers.squared[-1]), numbers.fired[-1]
        shape = (len(what.layers), max(map(len, positions)))
        counts = [len(what.layers) * len(chosen) for chosen in positions]

        def scattered(flat: np.ndarray) -> np.ndarray:
            cells = np.full((len(counts), *shape), np.nan, dtype=np.float32)
            for row, (part, chosen) in enumerate(zip(np.split(flat, np.cumsum(counts)[:-1]), positions, strict=True)):
                cells[row, :, : len(chosen)] = part.reshape(shape[0], len(chosen))
            return cells.reshape(-1, self.rows.draws, *shape)

        return Traced(np.stack([scattered(value) for value in values]), scattered(change), scattered(fired))


def _tokens_of(runtime: Runtime, metric: Metric, answers: torch.Tensor) -> torch.Tensor | None:
    """The token ids of a metric, one row an answer: its own, or the answers."""
    if not METRICS[metric.kind].tokens:
        return None
    if not metric.tokens:
        return answers
    own = [single_token(runtime.tokenizer, token) for token in metric.tokens]
    return torch.tensor([own]).expand(len(answers), -1)


def ranks(runtime: Runtime, facts: Sequence[EncodedFact], budget: Budget) -> np.ndarray:
    """The rank of each fact's answer in the clean run, axis (fact,); 0 is the most likely token."""
    answers = torch.tensor([[fact.answer] for fact in facts])
    request = Request(tuple(fact.prompt for fact in facts), (), (Metric("rank"),), (answers,))
    return prepare(runtime, request, "plain", budget).base[0]


def subject_deviation(runtime: Runtime, facts: Sequence[EncodedFact]) -> float:
    """Standard deviation of what the first layer receives at the subjects' tokens, in units of the embedding's."""
    kept = record(runtime, [fact.prompt.token_ids for fact in facts], {(BOUNDARY, 0)})
    (states,) = runtime.fetch([kept.values[BOUNDARY, 0]])
    chosen = [states[row, list(fact.prompt.span("subject"))] for row, fact in enumerate(facts)]
    return float(torch.cat(chosen).float().std()) / runtime.embedding_deviation
