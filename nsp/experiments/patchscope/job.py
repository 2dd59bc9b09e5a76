"""Patchscopes: what does a representation hold, in the model's own words?

The residual stream of a *source* prompt is read at one position and layer, and put in place of the placeholder of a
*target* prompt at some layer; the text that follows says what the model makes of it. Every (source layer, target
layer) is a cell; all cells of a unit of work decode together (`nsp.engine.implant`).

Controls: the target prompt without a patch, a random vector of the same norm, and the representation of another
entity. A success that the controls have too says nothing of the representation. Ghandeharioun et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.engine.budget import Budget
from nsp.engine.implant import Cells, check_implant, generate_cells, next_tokens_of, score_cells
from nsp.engine.plan import Plan
from nsp.engine.schedule import Estimate, Schedule, speed
from nsp.engine.scoring import continuation_logprobs
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.labels import text_array
from nsp.experiments.models import load_second
from nsp.experiments.patchscope.grid import Grid, grid_of, hotspot_cells, neighbours
from nsp.experiments.patchscope.match import answer_part, match_class
from nsp.experiments.patchscope.panels import panels
from nsp.experiments.patchscope.readings import Readings
from nsp.experiments.patchscope.recipe import PatchscopeRecipe
from nsp.experiments.patchscope.results import headline, summarise
from nsp.experiments.patchscope.sources import Row, make_rows, make_sources, make_targets, unrelated_source
from nsp.experiments.patchscope.store import (
    PATCH,
    Layout,
    baseline_variables,
    blank,
    effect_variables,
    generation_variables,
    receipt_variables,
    template,
)
from nsp.experiments.registry import Experiment, register
from nsp.model import Model
from nsp.recipe_errors import checked

KIND = "patchscope"
# Cells of one unit of work: what is lost at most when a run is killed, and enough to decode together.
_UNIT_CELLS = 1024

Places = np.ndarray  # integer array with axes (cell, 3): row, source layer and target layer by number
Arrays = dict[str, dict[str, np.ndarray]]


class PatchscopeJob:
    """A patchscope run, prepared: sources and templates encoded, layers resolved, nothing generated yet."""

    def __init__(self, model: Model, recipe: PatchscopeRecipe, source_model: Model | None = None) -> None:
        self.model, self.recipe = model, recipe
        self.source_model = source_model or model
        check_implant(model.runtime)
        if recipe.top > model.geometry.vocab_size:
            raise InputError(f"top is {recipe.top}; {model.name} has {model.geometry.vocab_size} tokens")
        sources = make_sources(self.source_model.tokenizer, recipe)
        extra = unrelated_source(self.source_model.tokenizer, sources)
        self.sources = sources if extra is None else (*sources, extra)
        self.targets = make_targets(model.tokenizer, recipe)
        self.rows = make_rows(model.tokenizer, self.sources, self.targets, len(sources))
        self.grid: Grid = grid_of(recipe, self.source_model.geometry.n_layers, model.geometry.n_layers)
        self.variants = (PATCH, *recipe.controls)
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        self._check_widths()
        self.readings = Readings(model, self.source_model, recipe, self.grid, self.sources, self.targets, self.rows)
        self.layout = Layout(
            self.rows, self.sources, self.targets, self.grid.layers, self.grid.target_layers, self.variants,
            recipe.generation.max_new_tokens, recipe.top,
        )  # fmt: skip

    def _check_widths(self) -> None:
        read, written = self.source_model.geometry.d_model, self.model.geometry.d_model
        if read != written and self.recipe.map is None:
            raise InputError(
                f"{self.source_model.name} has a residual stream of width {read}, {self.model.name} one of {written}: "
                "give map.prompts, on which an affine map between them is fitted"
            )

    # --- description ------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Plan:
        """The plan; its statement is what the recipe comes to."""
        recipe = self.recipe
        statement: dict[str, Any] = {
            "sources": [{"name": one.name, "token_ids": list(one.prompt.token_ids), "position": one.position} for one in self.sources],
            "targets": [
                {"name": one.template.name, "token_ids": list(one.prompt.token_ids), "position": one.position, "separator": one.template.separator}
                for one in self.targets
            ],
            "rows": [
                {
                    "source": row.source, "target": row.target, "unrelated": row.unrelated, "answer": list(row.answer),
                    "expected": None if row.expected is None else [list(row.expected.strong), list(row.expected.partial)],
                }
                for row in self.rows
            ],
            "layers": list(self.grid.layers),
            "target_layers": list(self.grid.target_layers),
            "coarse": self.grid.coarse,
            "variants": list(self.variants),
            "decoding": asdict(recipe.generation.to_decoding()),
            "top": recipe.top,
            "seed": recipe.seed,
        }  # fmt: skip
        if self.source_model is not self.model:
            statement["source_model"] = _stated(self.source_model)
        if recipe.map is not None:
            statement["map"] = {
                "ridge": recipe.map.ridge,
                "token_ids": [list(ids) for ids in self.readings.map_ids(self.model)],
            }
        return Plan(KIND, _stated(self.model), statement, Schedule((self._estimate(),)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device, {"generation": self.recipe.generation.seed})

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of rows, and of source layers where one row is a lot of work; a source's templates together where
        the grid is refined for it.
        """
        count, layers = len(self.rows), len(self.grid.layers)
        each = len(self.grid.target_layers) * len(self.variants)
        rows, deep = 1, layers
        if self.grid.coarse:
            rows = len(self.targets)
        elif layers * each >= _UNIT_CELLS:
            deep = max(1, _UNIT_CELLS // each)
        else:
            rows = min(count, _UNIT_CELLS // (layers * each))
        units: list[Unit] = []
        if self.recipe.map is not None:
            units.append(Unit(0, {"receipts/map": {}}))
        for low in range(0, count, rows):
            prompts = slice(low, min(low + rows, count))
            for first in range(0, layers, deep):
                region = {"prompt": prompts} | (
                    {"layer": slice(first, min(first + deep, layers))} if deep < layers else {}
                )
                regions: dict[str, Mapping[str, slice]] = {f"effects/{variant}": region for variant in self.variants}
                regions |= {"generations": region, "receipts/patch": region}
                if first == 0:
                    regions["baseline"] = {"prompt": prompts}
                units.append(Unit(len(units), regions))
        return tuple(units)

    def template(self) -> xr.DataTree:
        """All groups and labels, results blank."""
        return template(self.layout, with_map=self.recipe.map is not None)

    def _estimate(self) -> Estimate:
        runtime, grid, recipe = self.model.runtime, self.grid, self.recipe
        geometry, cost = self.model.geometry, runtime.cost
        cells = len(self.rows) * len(self.variants) * grid.cells()
        suffix = float(np.mean([len(one.prompt) - one.position for one in self.targets]))
        answer = float(np.mean([len(row.answer) for row in self.rows]))
        steps = recipe.generation.max_new_tokens
        above = geometry.n_layers - 1 - float(np.mean(grid.target_layers))
        token_layers = cells * ((3 * suffix + answer) * above + steps * geometry.n_layers)
        head = cells * (steps + answer + 2) * 2 * geometry.d_model * geometry.vocab_size
        flop = token_layers * cost.per_token + head
        length = max(len(one.prompt) for one in self.targets) + steps
        kept = 2 * geometry.n_layers * geometry.n_kv_heads * geometry.head_dim * length * runtime.dtype.itemsize
        naive = cells * (length + steps) * geometry.n_layers
        title = f"{len(self.rows)} prompts x {len(grid.layers)} x {len(grid.target_layers)} layers x {len(self.variants)} runs"
        return Estimate(
            title, "branch", "", int(cells), 0, len(self.units), int(cells * (3 * suffix + answer + steps)), int(token_layers), int(naive),
            flop, flop, flop / speed(str(runtime.device), runtime.dtype), int(1.5 * kept * min(512, cells)),
        )  # fmt: skip

    # --- running ----------------------------------------------------------------------------------------------------

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Run one block of rows: its cells, its controls, and its baseline."""
        if "receipts/map" in unit.regions:
            assert self.readings.layer_map is not None
            return {"receipts/map": {"r2": self.readings.layer_map.r2().astype(np.float32)}}
        region = unit.regions["effects/patch"]
        rows = range(len(self.rows))[region["prompt"]]
        layers = range(len(self.grid.layers))[region.get("layer", slice(None))]
        values = self._blank(len(rows), len(layers))
        if self.grid.coarse:
            self._run_phases(values, rows, progress)
        else:
            places = np.array(
                [
                    (row, layer, target)
                    for row in rows
                    for layer in layers
                    for target in range(len(self.grid.target_layers))
                ]
            )
            self._run_cells(values, places, (rows[0], layers[0]), 0, progress)
        if "baseline" in unit.regions:
            values["baseline"] = self._baseline(rows)
        return values

    def _run_phases(self, values: Arrays, rows: range, progress: BranchProgress | None) -> None:
        """One source: a coarse grid on its first template, the cells around its hotspots, then its other templates."""
        first, origin = rows[0], (rows[0], 0)
        coarse = self.grid.coarse_cells()
        self._run_cells(values, _at(first, coarse), origin, 0, progress)
        effects = values["effects/patch"]
        hot = hotspot_cells(coarse, effects["match"][0], effects["score"][0])
        around = [cell for cell in neighbours(hot, self.grid) if cell not in set(coarse)]
        self._run_cells(values, _at(first, around), origin, 1, progress)
        for row in rows[1:]:
            self._run_cells(values, _at(row, [*coarse, *around]), origin, 2, progress)

    def _run_cells(
        self, values: Arrays, places: Places, origin: tuple[int, int], phase: int, progress: BranchProgress | None
    ) -> None:
        """Run cells with every variant and put their numbers and texts into ``values``, whose corner is ``origin``
        (row, source layer).
        """
        if len(places) == 0:
            return
        numbers = sorted({int(row) for row in places[:, 0]})
        rows = [self.rows[number] for number in numbers]
        count, times = len(places), len(self.variants)
        vectors = torch.cat([self.readings.vectors(variant, places) for variant in self.variants])
        stacked = np.tile(places, (times, 1))
        shape = (len(self.rows), len(self.grid.layers), len(self.grid.target_layers))
        cells = Cells(
            tuple(self.targets[row.target].prompt for row in rows),
            tuple(self.targets[row.target].position for row in rows),
            vectors,
            np.searchsorted(numbers, stacked[:, 0]),
            np.asarray(self.grid.target_layers)[stacked[:, 2]],
            np.arange(len(stacked)),
            # A cell draws the same numbers in every variant, whatever runs beside it.
            np.ravel_multi_index(tuple(stacked.T), shape),
        )
        texts, tokens, measured = self._measure(cells, [self.rows[row] for row in stacked[:, 0]], rows, progress)
        index = (places[:, 0] - origin[0], places[:, 1] - origin[1], places[:, 2])
        for number, variant in enumerate(self.variants):
            part = slice(number * count, (number + 1) * count)
            effects = values[f"effects/{variant}"]
            for name in effects:
                if name != "phase":
                    effects[name][index] = measured[name][part]
            values["generations"]["text" if variant == PATCH else f"text_{variant}"][index] = texts[part]
        values["effects/patch"]["phase"][index] = phase
        values["generations"]["token_id"][index] = tokens[:count]
        held = self.readings.placeholders
        there = torch.stack([held[self.rows[row].target][layer] for row, _, layer in places])
        values["receipts/patch"]["vector_norm"][index] = vectors[:count].norm(dim=-1).numpy()
        values["receipts/patch"]["change_norm"][index] = (vectors[:count] - there).norm(dim=-1).numpy()

    def _measure(
        self, cells: Cells, owners: Sequence[Row], rows: Sequence[Row], progress: BranchProgress | None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Texts, token ids and numbers of cells; ``owners`` is the row of each, ``rows`` that of each target prompt."""
        runtime = self.model.runtime
        tokens = generate_cells(runtime, cells, self.recipe.generation.to_decoding(), self.budget, progress)
        wanted = np.array([[row.answer[0] if row.answer else -1] for row in owners])
        first = next_tokens_of(runtime, cells, wanted, self.recipe.top, self.budget)
        texts = self._texts(tokens)
        return texts, tokens, {
            "match": np.array([self._match(text, row) for text, row in zip(texts, owners, strict=True)], dtype=np.int8),
            "score": self._scores(cells, rows),
            "first_entropy": first.entropy,
            "first_logprob": first.logprob[:, 0],
            "first_rank": first.rank[:, 0],
            "first_top_id": first.top,
            "first_top_prob": first.top_prob,
        }  # fmt: skip

    def _scores(self, cells: Cells, rows: Sequence[Row]) -> np.ndarray:
        found = np.full(len(cells), np.nan)
        if bool((cells.layer < 0).all()):
            prompts = [cells.targets[target].token_ids for target in cells.target]
            given = continuation_logprobs(self.model.runtime, prompts, [rows[target].answer for target in cells.target])
            return np.array([values.sum() if len(values) else np.nan for values in given])
        having = np.flatnonzero([bool(rows[target].answer) for target in cells.target])
        if len(having):
            part = Cells(
                cells.targets,
                cells.positions,
                cells.vectors,
                cells.target[having],
                cells.layer[having],
                cells.vector[having],
            )
            # A row without an answer has no cell here; any token stands in for its answer.
            found[having] = score_cells(self.model.runtime, part, [row.answer or (0,) for row in rows], self.budget)
        return found

    def _baseline(self, rows: range) -> dict[str, np.ndarray]:
        owners = [self.rows[row] for row in rows]
        targets = [self.targets[row.target] for row in owners]
        numbers = np.arange(len(owners))
        nothing = torch.zeros(1, self.model.geometry.d_model)
        cells = Cells(
            tuple(one.prompt for one in targets), tuple(one.position for one in targets), nothing,
            numbers, np.full(len(owners), -1), np.zeros_like(numbers), np.asarray(rows),
        )  # fmt: skip
        texts, tokens, measured = self._measure(cells, owners, owners, None)
        return {name: measured[name] for name in baseline_variables() if name in measured} | {
            "text": texts,
            "token_id": tokens,
        }

    def _texts(self, tokens: np.ndarray) -> np.ndarray:
        decode = self.model.tokenizer.decode
        return text_array([decode([int(token) for token in row if token >= 0], skip_special_tokens=True) for row in tokens])

    def _match(self, text: str, row: Row) -> int:
        if row.expected is None:
            return -1
        return match_class(answer_part(text, self.targets[row.target].template.separator), row.expected)

    def _blank(self, rows: int, layers: int) -> Arrays:
        sizes = {
            "prompt": rows, "layer": layers, "target_layer": len(self.grid.target_layers),
            "step": self.layout.steps, "token": self.layout.top,
        }  # fmt: skip
        groups = {f"effects/{variant}": effect_variables(variant) for variant in self.variants}
        groups |= {"generations": generation_variables(self.variants), "receipts/patch": receipt_variables()}
        return {
            group: {name: blank(dims, dtype, sizes) for name, (dims, dtype, _) in variables.items()}
            for group, variables in groups.items()
        }


def _at(row: int, cells: Sequence[tuple[int, int]]) -> Places:
    return np.array([(row, *cell) for cell in cells], dtype=np.int64).reshape(-1, 3)


def _stated(model: Model) -> dict[str, Any]:
    stated = asdict(model.provenance)
    del stated["device"]
    return stated


def prepare(model: Model, recipe: PatchscopeRecipe) -> PatchscopeJob:
    """Check a recipe against its models and describe the run; loads the source model where it is another."""
    source = None if recipe.source_model is None else load_second(recipe.source_model, recipe.backend, model)
    return PatchscopeJob(model, recipe, source)


def patchscope(
    model: Model,
    sources: Any,
    *,
    templates: Any = "describe",
    source_model: Model | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> xr.DataTree:
    """A patchscope from Python: the recipe's keys as arguments, the recipe's results.

    Args:
        model: the model that the target prompts run on.
        sources, templates, and further keys (``layers``, ``preset``, ``controls``, ``generation``, ``map`` ...): as
            in the recipe.
        source_model: another loaded model to read from.
        out: where to keep the run as a store; None keeps it in memory alone.

    Returns a tree with ``effects/patch`` (and ``effects/random``, ``effects/unrelated``), ``baseline``,
    ``generations``, ``receipts`` and ``inputs``.
    """
    recipe = checked(PatchscopeRecipe, {"kind": KIND, "sources": sources, "templates": templates, **options})
    recipe.check()
    job = PatchscopeJob(model, recipe, source_model) if source_model is not None else prepare(model, recipe)
    return runner.results(job, out=out, force=force, progress=progress)


register(Experiment(KIND, PatchscopeRecipe, prepare, summarise, headline, panels=panels))
