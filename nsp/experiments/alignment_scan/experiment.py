"""Alignment scan: which MLP neurons fire on harmful prompts and not on normal ones?

The model: every neuron's value on every prompt of two sets, from one ordinary run per prompt; the store keeps them all,
and what is found is computed from them (`nsp.experiments.alignment_scan.select` says how, and what it is worth).

Cost: one forward pass per prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xarray as xr

from nsp.engine.estimates import Estimate, estimate_ordinary
from nsp.experiments.alignment_scan.activations import GROUP, activation_group, activation_stage
from nsp.experiments.alignment_scan.prompts import alignment_prompts
from nsp.experiments.alignment_scan.recipe import AlignmentScanRecipe
from nsp.experiments.experiment import Experiment, Stage
from nsp.experiments.labels import Group, prompts_dataset


class AlignmentScan(Experiment[AlignmentScanRecipe]):
    """A scan of one model. With ``auto: refusals`` the model answers every prompt when the scan is prepared."""

    results = "``activations/mlp_neurons`` (prompt, layer, neuron) and ``inputs`` (prompt, position)"

    def prepare(self) -> None:
        recipe = self.recipe
        pairs = recipe.pairs.select(recipe.pairs.read(), recipe.seed) if recipe.auto == "pairs" else ()
        self.scanned = alignment_prompts(self.model, recipe, pairs, recipe.seed)

    def statement(self) -> dict[str, Any]:
        thresholds = {name: getattr(self.recipe, name) for name in ("sigma", "min_precision", "level")}
        return {**self.scanned.statement(), **thresholds}

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        return {"inputs": prompts_dataset(self.scanned.prompts), GROUP: activation_group(self.model, self.scanned)}

    def stages(self) -> Sequence[Stage]:
        return [activation_stage(self.model, self.scanned)]

    def estimates(self) -> Iterable[Estimate]:
        return [estimate_ordinary(self.model.runtime, self.scanned.prompts, "mlp_neurons, recorded")]
