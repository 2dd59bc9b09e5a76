"""Patchscopes: what does a representation hold, in the model's own words?

The residual stream of a *source* prompt is read at one position and layer, and put in place of the placeholder of a
*target* prompt at some layer; the text that follows says what the model makes of it. Every (source layer, target
layer) is a cell; all cells of a unit of work decode together (`nsp.engine.vector_patching`).

Controls: the target prompt without a patch, a random vector of the same norm, and the representation of another
entity. A success that the controls have too says nothing of the representation. Ghandeharioun et al. 2024.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.engine.estimates import Estimate, speed
from nsp.engine.plan import model_statement
from nsp.engine.scoring import continuation_logprobs
from nsp.engine.vector_patching import VectorPatches, check_patched_generation, next_tokens_of
from nsp.errors import InputError
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, text_array
from nsp.experiments.patchscope.grid import grid_of, hotspot_cells, neighbours
from nsp.experiments.patchscope.groups import PATCH, inputs_dataset, result_groups, row_labels, text_name
from nsp.experiments.patchscope.match import answer_part, match_class
from nsp.experiments.patchscope.readings import Readings
from nsp.experiments.patchscope.recipe import PatchscopeRecipe
from nsp.experiments.patchscope.sources import Row, make_rows, make_sources, make_targets, unrelated_source
from nsp.progress import BranchProgress

# Cells of one unit of work: what is lost at most when a run is killed, and enough to decode together.
_UNIT_CELLS = 1024

Places = np.ndarray  # integer array with axes (cell, 3): row, source layer and target layer by number
Arrays = dict[str, dict[str, np.ndarray]]


class Patchscope(Experiment[PatchscopeRecipe]):
    """Sources read into target prompts, over a grid of source layers and target layers."""

    results = (
        "``effects/patch`` (and ``effects/random``, ``effects/unrelated``, the controls): ``match`` (does the text say what "
        "is expected: 0 no, 1 in part, 2 yes), ``score`` (log-probability of the answer), ``first_entropy``, "
        "``first_logprob`` and ``first_rank`` of the first token, dims (prompt, layer, target_layer); of the patched run also "
        "``first_top_id`` and ``first_top_prob``, dims (prompt, layer, target_layer, token), and ``phase``; ``generations``: "
        "``text``, ``text_<control>`` and ``token_id``; ``baseline``: the same of the run without a patch, dims (prompt,); "
        "``receipts/patch``: ``vector_norm`` and ``change_norm``; ``receipts/map``: ``r2``, dims (layer, target_layer); "
        "``inputs``: prompts, positions and what is expected. An entry of prompt is a source read into a template."
    )

    def prepare(self) -> None:
        model, recipe = self.model, self.recipe
        other = recipe.source_model
        self.source_model = model if other is None else self.second_model("source_model", other)
        check_patched_generation(model.runtime)
        if recipe.top > model.geometry.vocab_size:
            raise InputError(f"top is {recipe.top}; {model.name} has {model.geometry.vocab_size} tokens")
        sources = make_sources(self.source_model.tokenizer, recipe)
        extra = unrelated_source(self.source_model.tokenizer, sources)
        self.sources = sources if extra is None else (*sources, extra)
        self.targets = make_targets(model.tokenizer, recipe)
        self.rows = make_rows(model.tokenizer, self.sources, self.targets, len(sources))
        self.grid = grid_of(recipe, self.source_model.geometry.n_layers, model.geometry.n_layers)
        self.variants = (PATCH, *recipe.controls)
        self.decoding = recipe.generation.to_decoding()
        self._check_widths()
        self.readings = Readings(model, self.source_model, recipe, self.grid, self.sources, self.targets, self.rows)

    def _check_widths(self) -> None:
        read, written = self.source_model.geometry.d_model, self.model.geometry.d_model
        if read != written and self.recipe.map is None:
            raise InputError(
                f"{self.source_model.name} has a residual stream of width {read}, {self.model.name} one of {written}: "
                "give map.prompts, on which an affine map between them is fitted"
            )

    # --- description ------------------------------------------------------------------------------------------------

    def statement(self) -> dict[str, Any]:
        recipe = self.recipe
        statement: dict[str, Any] = {
            "sources": [
                {"name": source.name, "token_ids": list(source.prompt.token_ids), "position": source.position}
                for source in self.sources
            ],
            "targets": [
                {
                    "name": target.template.name,
                    "token_ids": list(target.prompt.token_ids),
                    "position": target.position,
                    "separator": target.template.separator,
                }
                for target in self.targets
            ],
            "rows": [
                {
                    "source": row.source,
                    "target": row.target,
                    "unrelated": row.unrelated,
                    "answer": list(row.answer),
                    "expected": None if row.expected is None else [list(row.expected.strong), list(row.expected.partial)],
                }
                for row in self.rows
            ],
            "layers": list(self.grid.layers),
            "target_layers": list(self.grid.target_layers),
            "coarse": self.grid.coarse,
            "variants": list(self.variants),
            "decoding": asdict(self.decoding),
            "top": recipe.top,
            "seed": recipe.seed,
        }
        if self.source_model is not self.model:
            statement["source_model"] = model_statement(self.source_model.provenance)
        if recipe.map is not None:
            texts = [list(ids) for ids in self.readings.map_ids(self.model)]
            statement["map"] = {"ridge": recipe.map.ridge, "token_ids": texts}
        return statement

    def seeds(self) -> Mapping[str, int]:
        return {"generation": self.recipe.generation.seed}

    def estimates(self) -> Iterable[Estimate]:
        runtime, grid = self.model.runtime, self.grid
        geometry, cost = self.model.geometry, runtime.cost
        cells = len(self.rows) * len(self.variants) * grid.cells()
        suffix = float(np.mean([len(target.prompt) - target.position for target in self.targets]))
        answer = float(np.mean([len(row.answer) for row in self.rows]))
        steps = self.decoding.max_new_tokens
        above = geometry.n_layers - 1 - float(np.mean(grid.target_layers))
        token_layers = cells * ((3 * suffix + answer) * above + steps * geometry.n_layers)
        head = cells * (steps + answer + 2) * 2 * geometry.d_model * geometry.vocab_size
        flop = token_layers * cost.per_token + head
        length = max(len(target.prompt) for target in self.targets) + steps
        kept = 2 * geometry.n_layers * geometry.n_kv_heads * geometry.head_dim * length * runtime.dtype.itemsize
        naive = cells * (length + steps) * geometry.n_layers
        title = f"{len(self.rows)} prompts x {len(grid.layers)} x {len(grid.target_layers)} layers x {len(self.variants)} runs"
        yield Estimate(
            title, "branch", "", int(cells), 0, len(self.units), int(cells * (3 * suffix + answer + steps)), int(token_layers), int(naive),
            flop, flop, flop / speed(str(runtime.device), runtime.dtype), int(1.5 * kept * min(512, cells)),
        )  # fmt: skip

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        labels = row_labels(self.rows, self.sources, self.targets)
        steps, top, with_map = self.decoding.max_new_tokens, self.recipe.top, self.recipe.map is not None
        results = result_groups(labels, self.grid, self.variants, steps, top, with_map=with_map)
        return {"inputs": inputs_dataset(self.rows, self.sources, self.targets), **results}

    # --- running ----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        """The map between the models; then blocks of rows, and of source layers where one row is a lot of work, a
        source's templates together where the grid is refined for it.
        """
        layers = len(self.grid.layers)
        each = len(self.grid.target_layers) * len(self.variants)
        split = {"prompt": max(1, min(len(self.rows), _UNIT_CELLS // (layers * each)))}
        if self.grid.coarse:
            split = {"prompt": len(self.targets)}
        elif layers * each >= _UNIT_CELLS:
            split = {"prompt": 1, "layer": max(1, _UNIT_CELLS // each)}
        groups = tuple(path for path in self.blanks if path not in ("inputs", "receipts/map"))
        fitting = (Stage(self._judge_map, ("receipts/map",)),) if self.recipe.map is not None else ()
        return (*fitting, Stage(self._run_block, groups, split))

    def _judge_map(self, region: Region, stored: Stored) -> Values:
        assert self.readings.layer_map is not None
        return {"receipts/map": {"r2": self.readings.layer_map.r2()}}

    def _run_block(self, region: Region, stored: Stored) -> Values:
        """Run one block of rows: its cells, its controls, and its baseline."""
        rows, layers = region.indices("prompt"), region.indices("layer")
        filled = [*(f"effects/{variant}" for variant in self.variants), "generations", "receipts/patch"]
        values = {path: self.unfilled(path, region) for path in filled}
        if self.grid.coarse:
            self._run_phases(values, rows, region.progress)
        else:
            targets = range(len(self.grid.target_layers))
            places = np.array([(row, layer, target) for row in rows for layer in layers for target in targets])
            self._run_cells(values, places, (rows[0], layers[0]), 0, region.progress)
        return values | ({"baseline": self._baseline(rows)} if layers[0] == 0 else {})

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
        patches = VectorPatches(
            tuple(self.targets[row.target].prompt for row in rows),
            tuple(self.targets[row.target].position for row in rows),
            vectors,
            np.searchsorted(numbers, stacked[:, 0]),
            np.asarray(self.grid.target_layers)[stacked[:, 2]],
            np.arange(len(stacked)),
            # A cell draws the same numbers in every variant, whatever runs beside it.
            np.ravel_multi_index(tuple(stacked.T), shape),
        )
        measured = self._measure(patches, [self.rows[row] for row in stacked[:, 0]], progress)
        measured["score"] = self._scores(patches, rows)
        measured["phase"] = np.full(len(stacked), phase)
        index = (places[:, 0] - origin[0], places[:, 1] - origin[1], places[:, 2])
        generations, receipts = values["generations"], values["receipts/patch"]
        for number, variant in enumerate(self.variants):
            part = slice(number * count, (number + 1) * count)
            for name, array in values[f"effects/{variant}"].items():
                array[index] = measured[name][part]
            generations[text_name(variant)][index] = measured["text"][part]
        generations["token_id"][index] = measured["token_id"][:count]
        held = self.readings.placeholders
        there = torch.stack([held[self.rows[row].target][layer] for row, _, layer in places])
        receipts["vector_norm"][index] = vectors[:count].norm(dim=-1).numpy()
        receipts["change_norm"][index] = (vectors[:count] - there).norm(dim=-1).numpy()

    def _measure(self, patches: VectorPatches, owners: Sequence[Row], progress: BranchProgress | None) -> dict[str, np.ndarray]:
        """Texts, token ids and numbers of cells, by variable; ``owners`` is the row of each cell."""
        branches, decode = patches.branches(self.model.runtime), self.model.tokenizer.decode
        tokens = self.engine.generate(branches, self.decoding, progress=progress).by_branch
        wanted = np.array([[row.answer[0] if row.answer else -1] for row in owners])
        first = next_tokens_of(self.model.runtime, branches, wanted, self.recipe.top, self.budget)
        texts = [decode([int(token) for token in row if token >= 0], skip_special_tokens=True) for row in tokens]
        return {
            "text": text_array(texts),
            "token_id": tokens,
            "match": np.array([self._match(text, row) for text, row in zip(texts, owners, strict=True)]),
            "first_entropy": first.entropy,
            "first_logprob": first.logprob[:, 0],
            "first_rank": first.rank[:, 0],
            "first_top_id": first.top,
            "first_top_prob": first.top_prob,
        }

    def _match(self, text: str, row: Row) -> int:
        if row.expected is None:
            return -1
        return match_class(answer_part(text, self.targets[row.target].template.separator), row.expected)

    def _scores(self, patches: VectorPatches, rows: Sequence[Row]) -> np.ndarray:
        """How likely each cell's answer is, in nats, (cell,); NaN where there is none."""
        scores = np.full(len(patches), np.nan)
        having = np.flatnonzero([bool(rows[target].answer) for target in patches.target])
        if len(having):
            target, layer, vector = patches.target[having], patches.layer[having], patches.vector[having]
            part = replace(patches, target=target, layer=layer, vector=vector, stream=None)
            # A row without an answer has no branch here; any token serves as its answer.
            answered = part.answered(self.model.runtime, [row.answer or (0,) for row in rows])
            scores[having] = self.engine.measure(answered).by_branch[0]
        return scores

    def _baseline(self, rows: range) -> dict[str, np.ndarray]:
        """The target prompts' runs without a patch, one a row."""
        owners = [self.rows[row] for row in rows]
        targets = [self.targets[row.target] for row in owners]
        prompts, positions = zip(*((target.prompt, target.position) for target in targets), strict=True)
        numbers = np.arange(len(owners))
        nothing = torch.zeros(1, self.model.geometry.d_model)
        unpatched = np.full(len(owners), -1)
        patches = VectorPatches(prompts, positions, nothing, numbers, unpatched, np.zeros_like(numbers), np.asarray(rows))
        measured = self._measure(patches, owners, None)
        ids, answers = [prompt.token_ids for prompt in prompts], [row.answer for row in owners]
        given = continuation_logprobs(self.model.runtime, ids, answers)
        measured["score"] = np.array([values.sum() if len(values) else np.nan for values in given])
        return {str(name): measured[str(name)] for name in self.blanks["baseline"].data_vars}


def _at(row: int, cells: Sequence[tuple[int, int]]) -> Places:
    return np.array([(row, *cell) for cell in cells], dtype=np.int64).reshape(-1, 3)
