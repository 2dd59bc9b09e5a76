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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import xarray as xr

from nsp.engine.estimates import Estimate
from nsp.engine.lowering import Resolved, resolve
from nsp.engine.measured import Measured
from nsp.engine.planning import choose_path
from nsp.engine.request import Request
from nsp.engine.selfcheck import ensure_checked
from nsp.experiments.activation_patching.mean_figure import patching_figure
from nsp.experiments.activation_patching.recipe import ActivationPatchingRecipe
from nsp.experiments.base_and_donor_runs import (
    baseline_group,
    baseline_values,
    effect_name,
    inputs_dataset,
    metric_tokens,
    metric_variables,
    pair_coord,
    paired_runs,
)
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable
from nsp.interventions import function_identity, patch
from nsp.metrics import METRICS, Metric
from nsp.results import axis_coords, normalised
from nsp.sites import Site
from nsp.trace import default_axes

# One unit of work: what is lost at most when a run is killed.
_UNIT_FLOP = 4e12
_AXES = ("layer", "position", "unit")


@dataclass(frozen=True)
class Sweep:
    """One swept selector.

    Attributes:
        group: its subgroup in the store: the component, numbered where the recipe has several of one.
        site: what is patched; ``axes`` those of layer, position and unit that are patched one by one.
        resolved: its layers, units, and positions in each base prompt.
    """

    group: str
    site: Site
    axes: tuple[str, ...]
    resolved: Resolved

    @property
    def dims(self) -> tuple[str, ...]:
        """The dims of its results."""
        names = {"layer": "layer", "position": "position", "unit": self.site.spec.dim}
        return ("pair", *(names[axis] for axis in _AXES if axis in self.axes))


class ActivationPatching(Experiment[ActivationPatchingRecipe]):
    """An activation-patching run: every selector resolved, every pair encoded and aligned."""

    results = (
        "``effects/<component>``: each metric, ``effect`` (normalised: 0 at the base run, 1 at the donor run) and "
        "``recovery_<metric>`` (in percent), dims (pair, layer, position) and head or neuron where these are patched one "
        "by one; ``receipts/<component>``: ``fired`` and ``change_norm``, same dims; ``baseline``: ``<metric>_clean`` and "
        "``<metric>_corrupt``, dims (pair,); ``inputs``: texts and tokens. Its report is ``tree.nsp.report()``."
    )

    def prepare(self) -> None:
        self.metrics = self.recipe.metrics()
        made = self.recipe.make_pairs(self.model.tokenizer)
        self.left_out = made.dropped
        self.runs = paired_runs(
            self.model, made.pairs, self.recipe.mode, self.metrics, continues=self.recipe.continues
        )
        ensure_checked(self.model.runtime)
        self.sweeps = self._sweeps()

    def _sweeps(self) -> list[Sweep]:
        bases = [run.base for run in self.runs]
        sweeps: list[Sweep] = []
        for site in self.recipe.selected_sites():
            axes = tuple(axis for axis in default_axes(site) if axis not in self.recipe.together)
            same = sum(sweep.site.component == site.component for sweep in sweeps)
            group = site.component if not same else f"{site.component}-{same + 1}"
            sweeps.append(Sweep(group, site, axes, resolve(self.model.runtime, site, bases)))
        return sweeps

    # --- description ------------------------------------------------------------------------------------------------

    def statement(self) -> dict[str, Any]:
        sweeps = [
            {
                "component": sweep.site.component,
                "axes": list(sweep.axes),
                "layers": list(sweep.resolved.layers),
                "units": None if sweep.resolved.units is None else list(sweep.resolved.units),
                "positions": [list(positions) for positions in sweep.resolved.positions],
            }
            for sweep in self.sweeps
        ]
        pairs = [
            {"base": list(run.base.token_ids), "donor": list(run.donor.token_ids), "tokens": list(run.tokens)}
            | ({"continuation": list(run.continuation)} if len(run.continuation) > 1 else {})
            for run in self.runs
        ]
        metrics = [_stated(metric) for metric in self.metrics]
        statement: dict[str, Any] = {"mode": self.recipe.mode, "pairs": pairs, "metrics": metrics, "sweeps": sweeps}
        return statement | ({"cumulative": True} if self.recipe.cumulative else {})

    def estimates(self) -> Iterable[Estimate]:
        return self._estimates

    @cached_property
    def _estimates(self) -> tuple[Estimate, ...]:
        every = range(len(self.runs))
        return tuple(
            self.engine.estimate(self.engine.plan(self._request(sweep, every)), str(sweep.site))
            for sweep in self.sweeps
        )

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        groups: dict[str, Group | xr.Dataset] = {
            "inputs": inputs_dataset(self.runs, self.left_out),
            "baseline": baseline_group(self.metrics, self.runs),
        }
        for sweep in self.sweeps:
            bases = [run.base for run in self.runs]
            coords: Any = {
                "pair": pair_coord(self.runs),
                **axis_coords(sweep.resolved, sweep.axes, bases, "pair", sweep.site.spec.dim),
            }
            path, reason = choose_path(self.model.runtime, self._request(sweep, [0]))
            groups[f"effects/{sweep.group}"] = self._effects(sweep, coords, path)
            groups[f"receipts/{sweep.group}"] = _receipts(sweep, coords, path, reason)
        return groups

    def _effects(self, sweep: Sweep, coords: Mapping[str, xr.Variable], path: str) -> Group:
        method = f"patch {sweep.site}, {self.recipe.mode}: one exact counterfactual a cell; {path} path"
        variables = metric_variables(self.metrics, sweep.dims, method)
        for metric in self.metrics:
            variables[f"recovery_{metric.name}"] = Variable(sweep.dims, **_recovery_attrs(metric, method))
        attrs: dict[str, Any] = {"site": str(sweep.site), "mode": self.recipe.mode}
        if self.recipe.cumulative:
            attrs["cumulative"] = "a layer's cell has the patch at the chosen layers before it too"
        everywhere = sweep.site.positions is None or sweep.site.positions.everything
        if sweep.site.spec.stream and "position" not in sweep.axes and everywhere:
            attrs["note"] = (
                f"{sweep.site.component} at all positions is always a full recovery: everything later is computed from it"
            )
        return Group(variables, coords, attrs)

    # --- running ----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        """A stage for each sweep, in blocks of pairs, and of layers where one pair is a lot of work."""
        count = len(self.runs)
        each = sum(estimated.work for estimated in self._estimates) / count
        block = max(1, min(count, int(_UNIT_FLOP / max(each, 1.0))))
        stages = []
        for number, sweep in enumerate(self.sweeps):
            split = {"pair": block}
            layers = len(sweep.resolved.layers)
            # A cumulative sweep's layers are one request: each needs those before it.
            if block == 1 and "layer" in sweep.axes and not self.recipe.cumulative:
                split["layer"] = -(-layers // min(layers, max(1, round(each / _UNIT_FLOP))))
            groups = (f"effects/{sweep.group}", f"receipts/{sweep.group}")
            stages.append(Stage(partial(self._run, sweep), (*groups, "baseline") if number == 0 else groups, split))
        return stages

    def _run(self, sweep: Sweep, region: Region, stored: Stored) -> Values:
        rows = region.indices("pair")
        request = self._request(sweep, rows, region.blocks.get("layer"))
        measured = self.engine.measure(self.engine.plan(request), progress=region.progress)
        effects, receipts = self._arrays(measured, sweep)
        values = {f"effects/{sweep.group}": effects, f"receipts/{sweep.group}": receipts}
        if sweep is self.sweeps[0]:
            assert measured.reference is not None
            runs = [self.runs[row] for row in rows]
            values["baseline"] = baseline_values(self.metrics, runs, measured.base, measured.reference)
        return values

    def _request(self, sweep: Sweep, rows: Sequence[int], layers: slice | None = None) -> Request:
        runs = [self.runs[row] for row in rows]
        site = sweep.site
        if layers is not None:
            site = site.with_(layers=sweep.resolved.layers[layers])
        donors = tuple(run.donor for run in runs)
        return Request(
            bases=tuple(run.base for run in runs),
            swept=(patch(site, donor=donors),),
            axes=sweep.axes,
            reference=donors,
            metrics=self.metrics,
            tokens=tuple(metric_tokens(self.model, metric, runs) for metric in self.metrics),
            cumulative=self.recipe.cumulative,
        )

    def _arrays(self, measured: Measured, sweep: Sweep) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        cells = (slice(None), *(slice(None) if axis in sweep.axes else 0 for axis in _AXES))
        effects = {}
        for number, metric in enumerate(self.metrics):
            effect = normalised(measured, number)[cells]
            effects[metric.name] = measured.values[number][cells]
            effects[effect_name(number, metric)] = effect
            effects[f"recovery_{metric.name}"] = 100 * effect
        return effects, {"change_norm": measured.change[cells], "fired": measured.fired[cells]}

    @classmethod
    def figure(cls, tree: xr.DataTree) -> Any:
        return patching_figure(tree)


def _receipts(sweep: Sweep, coords: Mapping[str, xr.Variable], path: str, reason: str) -> Group:
    method = f"reported by the engine, {path} path"
    change = "L2 norm of what the patch changed at the site (0: equal values, nothing ran)"
    fired = "writes made (0: effect exactly zero by construction, nothing ran; -1: not computed)"
    variables = {
        "change_norm": Variable(sweep.dims, change, "activation", method),
        "fired": Variable(sweep.dims, fired, "1", method, np.int32),
    }
    return Group(variables, coords, {"path": path, "path_reason": reason, "site": str(sweep.site)})


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
