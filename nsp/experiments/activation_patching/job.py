"""Activation patching: which sites carry the difference between two prompts?

The model: a pair of prompts that differ in what matters. A site's value from one run replaces its value in the other,
and a metric says how much of the difference comes along. ``denoising`` patches the clean run's value into the corrupt
run (is the site sufficient to restore the answer?), ``noising`` the corrupt run's into the clean one (is it
necessary?), ``interchange`` goes both ways (any two prompts, neither of them clean or corrupt).

Sign: ``effect`` is (patched - base) / (donor - base), so 0 is the base run and 1 the donor run in every mode.
``recovery_<metric>`` is the same in percent for each metric; for a distance from the donor, which is 0 there, that is
(d_base - d_patched) / d_base x 100.

Cost: one counterfactual a site, run by the engine's branch path (see `nsp.engine`), not one forward pass a site.

Limits: patching needs prompts whose tokens correspond. An effect says that a site carries the difference between
*these two* prompts; it does not say what the site computes on others. Vig et al. 2020; Meng et al. 2022; Heimersheim
and Nanda 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from nsp.engine.budget import Budget
from nsp.engine.lowering import Resolved, resolve
from nsp.engine.outcome import Outcome
from nsp.engine.plan import Plan, model_statement
from nsp.engine.schedule import Estimate, Schedule, estimate
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.sweep import PromptDonors, Request, choose_path, run_request
from nsp.experiments.activation_patching.items import (
    Sweep,
    inputs_dataset,
    make_items,
    make_sweeps,
    metric_tokens,
    pair_coord,
)
from nsp.experiments.activation_patching.panels import panels
from nsp.experiments.activation_patching.recipe import ActivationPatchingRecipe
from nsp.experiments.activation_patching.summary import headline, summarise
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.registry import Experiment, register
from nsp.interventions import function_identity, patch
from nsp.metrics import METRICS, Metric
from nsp.model import Model
from nsp.results import axis_coords, effect_attrs, normalised

KIND = "activation-patching"
# One unit of work: what is lost at most when a run is killed.
_UNIT_FLOP = 4e12


class PatchingJob:
    """An activation-patching run, prepared: every selector resolved, every pair encoded and aligned, nothing run yet.
    """

    def __init__(self, model: Model, recipe: ActivationPatchingRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.metrics = recipe.metrics()
        made = recipe.make_pairs(model.tokenizer)
        self.items = make_items(model, recipe, made.pairs)
        self.left_out = made.dropped
        self.sweeps = make_sweeps(recipe)
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        ensure_checked(model.runtime)
        prompts = [item.base for item in self.items]
        self.resolved: list[Resolved] = [resolve(model.runtime, sweep.site, prompts) for sweep in self.sweeps]
        self.estimates = [self._estimate(sweep) for sweep in self.sweeps]

    # --- description ------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Plan:
        """The plan; its statement is what the recipe comes to: token ids, resolved sites, metrics."""
        metrics = [_stated(metric) for metric in self.metrics]
        sweeps = [
            {
                "component": sweep.site.component,
                "axes": list(sweep.axes),
                "layers": list(item.layers),
                "units": None if item.units is None else list(item.units),
                "positions": [list(positions) for positions in item.positions],
            }
            for sweep, item in zip(self.sweeps, self.resolved, strict=True)
        ]
        pairs = [
            {"base": list(item.base.token_ids), "donor": list(item.donor.token_ids), "tokens": list(item.tokens)}
            | ({"continuation": list(item.continuation)} if len(item.continuation) > 1 else {})
            for item in self.items
        ]
        model = model_statement(self.model.provenance)
        statement: dict[str, Any] = {"mode": self.recipe.mode, "pairs": pairs, "metrics": metrics, "sweeps": sweeps}
        if self.recipe.cumulative:
            statement["cumulative"] = True
        return Plan(KIND, model, statement, Schedule(tuple(self.estimates)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of pairs, and of layers where one pair is a lot of work; the same for the same plan on every machine.
        """
        count = len(self.items)
        each = sum(one.work for one in self.estimates) / count
        block = max(1, min(count, int(_UNIT_FLOP / max(each, 1.0))))
        units: list[Unit] = []
        for low in range(0, count, block):
            pairs = slice(low, min(low + block, count))
            for number, sweep in enumerate(self.sweeps):
                for first, layers in self._layer_blocks(number, each if block == 1 else 0.0):
                    region = {"pair": pairs} | ({"layer": layers} if layers is not None else {})
                    regions = {f"effects/{sweep.group}": region, f"receipts/{sweep.group}": region}
                    if number == 0 and first:
                        regions["baseline"] = {"pair": pairs}
                    units.append(Unit(len(units), regions))
        return tuple(units)

    def _layer_blocks(self, number: int, flop: float) -> list[tuple[bool, slice | None]]:
        sweep, layers = self.sweeps[number], len(self.resolved[number].layers)
        # A cumulative sweep's layers are one request: each needs those before it.
        apart = "layer" in sweep.axes and not self.recipe.cumulative
        parts = min(layers, max(1, round(flop / _UNIT_FLOP))) if apart else 1
        if parts == 1:
            return [(True, None)]
        size = -(-layers // parts)
        return [(low == 0, slice(low, min(low + size, layers))) for low in range(0, layers, size)]

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        tree: dict[str, xr.Dataset] = {"inputs": inputs_dataset(self.items, self.left_out), "baseline": self._baseline()}
        for sweep, item in zip(self.sweeps, self.resolved, strict=True):
            tree[f"effects/{sweep.group}"] = self._effects(sweep, item)
            tree[f"receipts/{sweep.group}"] = self._receipts(sweep, item)
        return xr.DataTree.from_dict(tree)

    def _dims(self, sweep: Sweep, item: Resolved) -> tuple[tuple[str, ...], tuple[int, ...]]:
        names = {"layer": "layer", "position": "position", "unit": sweep.site.spec.dim}
        sizes = {"layer": len(item.layers), "position": max(map(len, item.positions)), "unit": len(item.unit_rows)}
        axes = [axis for axis in ("layer", "position", "unit") if axis in sweep.axes]
        return ("pair", *(names[axis] for axis in axes)), (len(self.items), *(sizes[axis] for axis in axes))

    def _coords(self, sweep: Sweep, item: Resolved) -> dict[str, Any]:
        prompts = [one.base for one in self.items]
        return {
            "pair": pair_coord(self.items),
            **axis_coords(item, sweep.axes, prompts, "pair", sweep.site.spec.dim),
        }

    def _effects(self, sweep: Sweep, item: Resolved) -> xr.Dataset:
        dims, shape = self._dims(sweep, item)
        blank = np.full(shape, np.nan, dtype=np.float32)
        path, _ = choose_path(self.model.runtime, self._request(sweep, [0]))
        method = f"patch {sweep.site}, {self.recipe.mode}: one exact counterfactual a cell; {path} path"
        variables: dict[str, Any] = {}
        for number, metric in enumerate(self.metrics):
            kind = METRICS[metric.kind]
            variables[metric.name] = (dims, blank, {"long_name": kind.long_name, "units": kind.units, "method": method})
            variables[_effect_name(number, metric)] = (dims, blank, effect_attrs(metric, method))
            variables[f"recovery_{metric.name}"] = (dims, blank, _recovery_attrs(metric, method))
        attrs: dict[str, Any] = {"site": str(sweep.site), "mode": self.recipe.mode}
        if self.recipe.cumulative:
            attrs["cumulative"] = "a layer's cell has the patch at the chosen layers before it too"
        everywhere = sweep.site.positions is None or sweep.site.positions.everything
        if sweep.site.spec.stream and "position" not in sweep.axes and everywhere:
            attrs["note"] = (
                f"{sweep.site.component} at all positions is always a full recovery: everything later is computed from it"
            )
        return xr.Dataset(variables, self._coords(sweep, item), attrs)

    def _receipts(self, sweep: Sweep, item: Resolved) -> xr.Dataset:
        dims, shape = self._dims(sweep, item)
        path, reason = choose_path(self.model.runtime, self._request(sweep, [0]))
        how = {"method": f"reported by the engine, {path} path"}
        variables = {
            "change_norm": (dims, np.full(shape, np.nan, dtype=np.float32), {
                "long_name": "L2 norm of what the patch changed at the site (0: equal values, nothing ran)", "units": "activation", **how}),
            "fired": (dims, np.full(shape, -1, dtype=np.int32), {
                "long_name": "writes made (0: effect exactly zero by construction, nothing ran; -1: not computed)", "units": "1", **how}),
        }  # fmt: skip
        return xr.Dataset(
            variables, self._coords(sweep, item), {"path": path, "path_reason": reason, "site": str(sweep.site)}
        )

    def _baseline(self) -> xr.Dataset:
        variables: dict[str, Any] = {}
        for metric in self.metrics:
            kind = METRICS[metric.kind]
            for run in ("clean", "corrupt"):
                attrs = {
                    "long_name": f"{kind.long_name}, {run} run",
                    "units": kind.units,
                    "method": "ordinary forward pass",
                }
                variables[f"{metric.name}_{run}"] = (
                    ("pair",),
                    np.full(len(self.items), np.nan, dtype=np.float32),
                    attrs,
                )
        return xr.Dataset(variables, {"pair": pair_coord(self.items)})

    # --- running ----------------------------------------------------------------------------------------------------

    def _request(self, sweep: Sweep, rows: Sequence[int], layers: slice | None = None) -> Request:
        items = [self.items[row] for row in rows]
        site = sweep.site
        if layers is not None:
            chosen = self.resolved[self.sweeps.index(sweep)].layers[layers]
            site = site.with_(layers=chosen)
        donors = tuple(item.donor for item in items)
        return Request(
            bases=tuple(item.base for item in items),
            swept=(patch(site, donor=donors),),
            axes=sweep.axes,
            donors=(PromptDonors(donors),),
            reference=donors,
            metrics=self.metrics,
            tokens=tuple(metric_tokens(self.model, metric, items) for metric in self.metrics),
            cumulative=self.recipe.cumulative,
        )

    def _estimate(self, sweep: Sweep) -> Estimate:
        return estimate(self.model.runtime, self._request(sweep, range(len(self.items))), self.budget, str(sweep.site))

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Run one sweep over one block of pairs (and layers)."""
        path = next(group for group in unit.regions if group.startswith("effects/"))
        region = unit.regions[path]
        sweep = next(one for one in self.sweeps if path == f"effects/{one.group}")
        item = self.resolved[self.sweeps.index(sweep)]
        rows = range(len(self.items))[region["pair"]]
        outcome = run_request(
            self.model.runtime, self._request(sweep, rows, region.get("layer")), self.budget, progress
        )
        dims, shape = self._dims(sweep, item)
        size = list(shape)
        for number, dim in enumerate(dims):
            if dim in region:
                size[number] = len(range(shape[number])[region[dim]])
        effects, receipts = self._unit_arrays(outcome, sweep, tuple(size))
        values: dict[str, dict[str, np.ndarray]] = {path: effects, f"receipts/{sweep.group}": receipts}
        if "baseline" in unit.regions:
            values["baseline"] = self._unit_baseline(outcome, rows)
        return values

    def _unit_arrays(
        self, outcome: Outcome, sweep: Sweep, size: tuple[int, ...]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        def fitted(values: np.ndarray, blank: float, dtype: Any) -> np.ndarray:
            # Shorter prompts end early: their cells beyond stay blank.
            keep = [slice(None)] + [slice(None) if axis in sweep.axes else 0 for axis in ("layer", "position", "unit")]
            part = values[tuple(keep)]
            full = np.full(size, blank, dtype=dtype)
            full[tuple(slice(0, extent) for extent in part.shape)] = np.where(np.isnan(part), blank, part)
            return full

        effects = {}
        for number, metric in enumerate(self.metrics):
            effect = fitted(normalised(outcome, number), np.nan, np.float32)
            effects[metric.name] = fitted(outcome.values[number], np.nan, np.float32)
            effects[_effect_name(number, metric)] = effect
            effects[f"recovery_{metric.name}"] = 100 * effect
        receipts = {
            "change_norm": fitted(outcome.change, np.nan, np.float32),
            "fired": fitted(outcome.fired, -1, np.int32),
        }
        return effects, receipts

    def _unit_baseline(self, outcome: Outcome, rows: Sequence[int]) -> dict[str, np.ndarray]:
        assert outcome.reference is not None
        clean_is_base = np.array([self.items[row].base_name == "clean" for row in rows])
        found = {}
        for number, metric in enumerate(self.metrics):
            base, donor = outcome.base[number], outcome.reference[number]
            found[f"{metric.name}_clean"] = np.where(clean_is_base, base, donor).astype(np.float32)
            found[f"{metric.name}_corrupt"] = np.where(clean_is_base, donor, base).astype(np.float32)
        return found


def _effect_name(number: int, metric: Metric) -> str:
    return "effect" if number == 0 else f"effect_{metric.name}"


def _recovery_attrs(metric: Metric, method: str) -> dict[str, str]:
    distance = METRICS[metric.kind].distance and metric.reference == "donor"
    how = "(base - patched) / base" if distance else "(patched - base) / (donor - base)"
    return {
        "long_name": f"recovery of {metric.name}: 0 % at the base run, 100 % at the donor run",
        "units": "%",
        "method": f"100 * {how} of {metric.name}; {method}",
    }


def _stated(metric: Metric) -> dict[str, Any]:
    """A metric as the plan has it: with a digest of what its function does, if it is one."""
    stated = metric.to_dict()
    if metric.function:
        stated["digest"] = function_identity(metric.called())["digest"]
    return stated


def prepare(model: Model, recipe: ActivationPatchingRecipe) -> PatchingJob:
    """Check a recipe against a model and describe the run; nothing is written and no sweep runs."""
    return PatchingJob(model, recipe)


register(
    Experiment(
        KIND,
        ActivationPatchingRecipe,
        prepare,
        summarise,
        headline,
        report_keys=("statistics", "threshold", "split"),
        panels=panels,
    )
)
