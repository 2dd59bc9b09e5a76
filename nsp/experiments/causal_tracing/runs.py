"""The runs of causal tracing: facts with noisy subjects as trunks, and one branch for each state restored.

One *row* is one fact under one draw of noise. The corrupted run of a row is the trunk of its branches, so a branch that
restores layer l at position p runs from there on and reuses everything that the noise alone decides. On models without
the branch path every branch carries noise and restoration through a full pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from nsp.datasets.facts import EncodedFact
from nsp.datasets.prompts import Prompt
from nsp.datasets.tokens import single_token
from nsp.engine.branches import Bases, Branches, Source, Writes
from nsp.engine.engine import Engine
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.lowering import site_slots
from nsp.engine.measuring import Progress
from nsp.engine.request import Request
from nsp.engine.runtime import Runtime
from nsp.engine.slots import BOUNDARY, Slot, slot_of
from nsp.interventions import Noise, inject
from nsp.metrics import METRICS, Metric
from nsp.sites import Selection, Site


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
    sources, columns = [], []
    for row, (prompt, seed) in enumerate(zip(rows.prompts, rows.seeds.reshape(-1), strict=True)):
        statement = inject("embed @ subject", Noise(rows.scale, int(seed)))
        (writes,) = FixedInterventions.of(runtime, [statement], [prompt]).writes([prompt])
        assert writes.source is not None
        sources.append(writes.source)
        columns.append(np.stack([np.full(len(writes), row), writes.position]))
    longest = max(map(len, rows.prompts))

    @cache
    def drawn(slot: Slot) -> torch.Tensor:
        values = [source.values(slot)[0] for source in sources]
        return torch.stack([torch.nn.functional.pad(value, (0, 0, 0, longest - len(value))) for value in values])

    branch, position = np.concatenate(columns, axis=1).astype(np.int64)
    nothing = np.zeros_like(branch)
    source = Source(drawn, run=np.arange(len(sources)))
    return Writes(BOUNDARY, "add", 1, branch, nothing, position, nothing, source, name="embed @ subject")


def restore_branches(bases: Bases, rows: Rows, what: Restored, having: Sequence[int]) -> tuple[Branches, list[tuple[int, ...]]]:
    """One branch for each row, layer and position, in that order, that has the clean values there, and the positions of each
    row.

    ``having`` are the layers that have the component. Tokens before the subject never see the noise, so nothing is written
    there.
    """
    positions = rows.positions(what.positions)
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
    source = Source(bases.value, run=bases.runs_of(rows.prompts))
    component = slot_of(what.component, 0)[0]
    unit = np.zeros_like(branch_of)
    writes = Writes(component, "set", 1, branch_of, layer_of, place_of, unit, source, name=what.component)
    return bases.branches(np.concatenate(owners).astype(np.int64), [writes]), positions


def corrupted_bases(engine: Engine, rows: Rows, metrics: Sequence[Metric], components: Sequence[str]) -> Bases:
    """The rows with noise at their subjects, which all their branches have, and beside them the clean runs."""
    prompts = tuple(rows.prompts)
    answers = torch.tensor([[fact.answer] for fact in rows.facts for _ in range(rows.draws)])
    tokens = tuple(_tokens_of(engine.runtime, metric, answers) for metric in metrics)
    noise = (noise_writes(engine.runtime, rows),)
    request = Request(prompts, (), tuple(metrics), tokens, reference=prompts, carried=noise)
    bases = engine.plan(request, further=True).bases
    bases.slots = frozenset(site_slots(engine.runtime, map(Site.of, components)))
    for each in bases.measures:
        each.of_donor = True  # distances are from the clean run, which runs beside the bases
    return bases


class CorruptedRuns:
    """The clean and corrupted runs of some facts, and counterfactuals that restore clean states.

    Attributes:
        clean, corrupted: the metrics without restoration, axes (metric, fact) and (metric, fact, draw).
    """

    def __init__(
        self,
        engine: Engine,
        rows: Rows,
        metrics: Sequence[Metric],
        components: Sequence[str],
    ) -> None:
        self.engine, self.rows = engine, rows
        self.bases = corrupted_bases(engine, rows, metrics, components)
        runs = engine.measure(self.bases.branches())
        assert runs.reference is not None
        self.corrupted = np.stack(runs.base).reshape(len(metrics), -1, rows.draws)
        self.clean = np.stack(runs.reference).reshape(len(metrics), -1, rows.draws)[..., 0]

    def restore(self, what: Restored, progress: Progress | None = None) -> Traced:
        """Every state of ``what`` restored, one counterfactual a row, layer and position."""
        having = self.engine.runtime.geometry.layers_of(what.component)
        branches, positions = restore_branches(self.bases, self.rows, what, having)
        measured = self.engine.measure(branches, progress=progress)
        shape = (len(what.layers), max(map(len, positions)))
        counts = [len(what.layers) * len(chosen) for chosen in positions]

        def scattered(flat: np.ndarray) -> np.ndarray:
            cells = np.full((len(counts), *shape), np.nan, dtype=np.float32)
            for row, (part, chosen) in enumerate(zip(np.split(flat, np.cumsum(counts)[:-1]), positions, strict=True)):
                cells[row, :, : len(chosen)] = part.reshape(shape[0], len(chosen))
            return cells.reshape(-1, self.rows.draws, *shape)

        values = np.stack([scattered(value) for value in measured.by_branch])
        return Traced(values, scattered(measured.change_by_branch), scattered(measured.fired_by_branch))


def _tokens_of(runtime: Runtime, metric: Metric, answers: torch.Tensor) -> torch.Tensor | None:
    """The token ids of a metric, one row an answer: its own, or the answers."""
    if not METRICS[metric.kind].tokens:
        return None
    if not metric.tokens:
        return answers
    own = [single_token(runtime.tokenizer, token) for token in metric.tokens]
    return torch.tensor([own]).expand(len(answers), -1)


def ranks(engine: Engine, facts: Sequence[EncodedFact]) -> np.ndarray:
    """The rank of each fact's answer in the clean run, axis (fact,); 0 is the most likely token."""
    answers = torch.tensor([[fact.answer] for fact in facts])
    request = Request(tuple(fact.prompt for fact in facts), (), (Metric("rank"),), (answers,))
    return engine.measure(engine.plan(request)).base[0]


def subject_deviation(engine: Engine, facts: Sequence[EncodedFact]) -> float:
    """Standard deviation of what the first layer receives at the subjects' tokens, in units of the embedding's."""
    states = engine.record([fact.prompt for fact in facts], ["embed"]).at("embed", 0)
    chosen = [states[row, list(fact.prompt.span("subject"))] for row, fact in enumerate(facts)]
    return float(torch.cat(chosen).float().std()) / engine.runtime.embedding_deviation
