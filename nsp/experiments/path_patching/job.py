"""Path patching: does one component act on another directly?

The model: a *base* run, and a *donor* run whose prompt differs in what matters. A *sender* (a head, an attention or MLP
output, the embedding) adds something else to the residual stream in the donor run. Only what one *receiver* reads of
that stream (a head's queries, keys or values, an MLP, the logits) gets the difference; every other component between
them keeps its base value. Then the run goes on from the receiver as usual, and what changes at the output is the effect
of that one direct path. Wang et al. 2022; Goldowsky-Dill et al. 2023.

    delta(s)       = what s adds to the residual stream in the donor run - what it adds in the base run
    value(s, r)    = r computed from [the base's state that r reads + delta(s)], token by token
    effect(s -> r) = (m(base run with r set to value(s, r)) - m(base)) / (m(donor) - m(base))

Sender and receiver stand at the same positions, since a path through the residual stream stays within a token; keys and
values then carry the change on to later tokens. ``positions`` are patched all together.

Cost: one counterfactual a path, run by the engine's branch path from the receiver's layer on; the changes and the
receivers' values take a few passes a layer (see `nsp.experiments.path_patching.runs`).

Limits: one hop. Everything between is frozen, MLPs too (Wang et al. let MLPs run on), so an effect that goes through a
third component is none of this path's; effects of paths do not add up. Where a family puts a norm behind attention
(Gemma 2, OLMo 2), a head's delta is what the normed attention output changes by when this head alone changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.pairs import Pair
from nsp.engine.budget import Budget
from nsp.engine.estimates import Estimate, Schedule
from nsp.engine.plan import Plan, model_statement
from nsp.engine.selfcheck import ensure_checked
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.activation_patching.paired_runs import PairedRun, inputs_dataset, metric_tokens
from nsp.experiments.arguments import recipe_value as pair_keys
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of, warn_nonfinite
from nsp.experiments.labels import index_coord, text_array
from nsp.experiments.path_patching.nodes import check_stream, receivers_of, senders_of
from nsp.experiments.path_patching.panels import panels
from nsp.experiments.path_patching.recipe import PathPatchingRecipe
from nsp.experiments.path_patching.runs import Paths, cells_of, measured_bases, path_branches
from nsp.experiments.path_patching.summary import summarise
from nsp.experiments.registry import Experiment, register
from nsp.experiments.selections import as_list
from nsp.metrics import METRICS
from nsp.model import Model
from nsp.recipe_errors import checked
from nsp.results import effect_attrs
from nsp.sites import Selection

KIND = "path-patching"
GROUP = "paths"
# One unit of work: what is lost at most when a run is killed.
_UNIT_FLOP = 4e12
# Bytes of what all senders change in one block of pairs.
_CHANGE_BYTES = 512 * 2**20
_TINY = 1e-6


class PathJob:
    """A path-patching run, prepared: pairs encoded and aligned, senders and receivers found, nothing run yet."""

    def __init__(self, model: Model, recipe: PathPatchingRecipe) -> None:
        self.model, self.recipe, self.metrics = model, recipe, recipe.metrics()
        runtime = model.runtime
        check_stream(model.geometry)
        self.budget = Budget.of(recipe.memory_bytes, runtime.device)
        ensure_checked(runtime)
        made = recipe.make_pairs(model.tokenizer)
        self.left_out = made.dropped
        self.items = [self._item(number, pair) for number, pair in enumerate(made.pairs)]
        self.bases, self.donors = [item.base for item in self.items], [item.donor for item in self.items]
        self.tokens = [metric_tokens(model, metric, self.items) for metric in self.metrics]
        self.senders = senders_of(runtime, recipe.senders)
        self.receivers = receivers_of(runtime, recipe.receivers)
        self.positions = Selection.of(recipe.positions)
        self.cells = cells_of(self.bases, self.donors, self.positions)
        self.estimates = [self._estimate()]
        self._paths: tuple[slice, Paths] | None = None
        if self.estimates[0].branches + self.estimates[0].pruned == 0:
            raise InputError(
                f"no sender reaches a receiver: {', '.join(recipe.senders)} come after {', '.join(recipe.receivers)}"
            )

    # --- description ------------------------------------------------------------------------------------------------

    def _item(self, number: int, pair: Pair) -> PairedRun:
        """A pair as its base run and donor run."""
        encoded = pair.encode(self.model.tokenizer)
        tokens = tuple(token for token in (encoded.answer, encoded.distractor) if token is not None)
        needed = max((METRICS[metric.kind].tokens for metric in self.metrics if not metric.tokens), default=0)
        if len(tokens) < needed:
            also = " and a distractor" if needed > 1 else ""
            raise InputError(f"{pair.label()}: the metric needs an answer{also}; name them, or take a metric such as kl")
        name = pair.name or f"pair {number}"
        if self.recipe.mode == "noising":
            return PairedRun(name, encoded.clean, encoded.corrupt, "clean", tokens, tokens[:1])
        return PairedRun(name, encoded.corrupt, encoded.clean, "corrupt", tokens, tokens[:1])

    def _estimate(self) -> Estimate:
        """The cost from the first pair, times the pairs."""
        engine = self.model.engine.within(self.recipe.memory_bytes)
        first = cells_of(self.bases[:1], self.donors[:1], self.positions)
        tokens = [None if given is None else given[:1] for given in self.tokens]
        bases = measured_bases(self.model.runtime, self.bases[:1], self.donors[:1], self.metrics, tokens)
        parts = []
        for stage in sorted({(node.place, node.layer) for node in self.receivers}):
            group = [node for node in self.receivers if (node.place, node.layer) == stage]
            parts.append(engine.estimate(path_branches(bases, first, self.senders, group, {})[1]))
        count = len(self.bases)
        names = ("branches", "pruned", "passes", "tokens", "token_layers", "naive_token_layers", "work", "flop", "seconds")
        total = {name: sum(getattr(part, name) for part in parts) * count for name in names}
        kept = self._pairs_at_once * self._change_bytes
        peak = max(part.bytes for part in parts) + kept * (2 + self.model.geometry.n_layers // max(1, len(self.senders)))
        title = f"{len(self.senders)} senders x {len(self.receivers)} receivers"
        return replace(parts[0], title=title, bytes=peak, **total)

    @property
    def _change_bytes(self) -> int:
        """Bytes of what all senders change in the longest pair."""
        return len(self.senders) * max(map(len, self.bases)) * self.model.geometry.d_model * 4

    @property
    def _pairs_at_once(self) -> int:
        return max(1, min(len(self.bases), _CHANGE_BYTES // max(1, self._change_bytes)))

    @cached_property
    def plan(self) -> Plan:
        """The plan: token ids, cells, senders, receivers, metrics."""
        pairs = [
            {"base": list(item.base.token_ids), "donor": list(item.donor.token_ids), "tokens": list(item.tokens)}
            for item in self.items
        ]
        statement = {
            "mode": self.recipe.mode,
            "pairs": pairs,
            "cells": np.stack([self.cells.base, self.cells.position, self.cells.donor], axis=1).tolist(),
            "senders": [node.label for node in self.senders],
            "receivers": [node.label for node in self.receivers],
            "metrics": [metric.to_dict() for metric in self.metrics],
        }
        return Plan(KIND, model_statement(self.model.provenance), statement, Schedule(tuple(self.estimates)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.model.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of pairs, and of receivers where one block of pairs is a lot of work."""
        count, receivers = len(self.bases), len(self.receivers)
        each = self.estimates[0].work / count
        pairs = max(1, min(self._pairs_at_once, int(_UNIT_FLOP / max(each, 1.0))))
        parts = min(receivers, max(1, round(each * pairs / _UNIT_FLOP)))
        size = -(-receivers // parts)
        units: list[Unit] = []
        for low in range(0, count, pairs):
            rows = slice(low, min(low + pairs, count))
            for first in range(0, receivers, size):
                region = {"pair": rows, "receiver": slice(first, min(first + size, receivers))}
                regions: dict[str, dict[str, slice]] = {f"effects/{GROUP}": region, f"receipts/{GROUP}": region}
                if first == 0:
                    regions["baseline"] = {"pair": rows}
                units.append(Unit(len(units), regions))
        return tuple(units)

    # --- the store ---------------------------------------------------------------------------------------------------

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        return xr.DataTree.from_dict(
            {
                "inputs": self._inputs(),
                "baseline": self._baseline(),
                f"effects/{GROUP}": self._effects(),
                f"receipts/{GROUP}": self._receipts(),
            }
        )

    @property
    def _shape(self) -> tuple[int, int, int]:
        return len(self.bases), len(self.senders), len(self.receivers)

    def _coords(self) -> dict[str, Any]:
        coords: dict[str, Any] = {"pair": index_coord("pair", len(self.bases), "pair of prompts, from 0")}
        for dim, nodes in (("sender", self.senders), ("receiver", self.receivers)):
            numbers = {"layer": [node.layer for node in nodes], "head": [-1 if n.unit is None else n.unit for n in nodes]}
            coords[dim] = xr.Variable((dim,), text_array([node.label for node in nodes]), {"long_name": f"{dim} of a path"})
            words = {"layer": f"layer of the {dim}", "head": f"head of the {dim} (-1: the whole component)"}
            for name, values in numbers.items():
                coords[f"{dim}_{name}"] = xr.Variable((dim,), np.array(values, dtype=np.int64), {"long_name": words[name]})
        return coords

    def _effects(self) -> xr.Dataset:
        dims = ("pair", "sender", "receiver")
        blank = np.full(self._shape, np.nan, dtype=np.float32)
        method = (
            f"direct path patched from the {'corrupt' if self.recipe.mode == 'noising' else 'clean'} run, all between frozen; "
            f"{self.estimates[0].path} path"
        )
        variables: dict[str, Any] = {}
        for number, metric in enumerate(self.metrics):
            kind = METRICS[metric.kind]
            variables[metric.name] = (dims, blank, {"long_name": kind.long_name, "units": kind.units, "method": method})
            name = "effect" if number == 0 else f"effect_{metric.name}"
            variables[name] = (dims, blank, effect_attrs(metric, method))
        attrs = {"mode": self.recipe.mode, "note": "NaN where the sender comes after the receiver: there is no path"}
        return xr.Dataset(variables, self._coords(), attrs)

    def _receipts(self) -> xr.Dataset:
        dims = ("pair", "sender", "receiver")
        how = {"method": f"reported by the engine, {self.estimates[0].path} path"}
        variables = {
            "change_norm": (dims, np.full(self._shape, np.nan, dtype=np.float32), {
                "long_name": "L2 norm of what the path changed at the receiver (for logits: in the final residual stream)",
                "units": "activation", **how}),
            "fired": (dims, np.full(self._shape, -1, dtype=np.int32), {
                "long_name": "writes made (0: effect exactly zero by construction; -1: no path, or not computed)",
                "units": "1", **how}),
        }  # fmt: skip
        attrs = {"path": self.estimates[0].path, "path_reason": self.estimates[0].reason}
        return xr.Dataset(variables, self._coords(), attrs)

    def _baseline(self) -> xr.Dataset:
        variables: dict[str, Any] = {}
        for metric in self.metrics:
            kind = METRICS[metric.kind]
            for run in ("clean", "corrupt"):
                attrs = {"long_name": f"{kind.long_name}, {run} run", "units": kind.units, "method": "ordinary forward pass"}
                blank = np.full(len(self.bases), np.nan, dtype=np.float32)
                variables[f"{metric.name}_{run}"] = (("pair",), blank, attrs)
        return xr.Dataset(variables, {"pair": index_coord("pair", len(self.bases), "pair of prompts, from 0")})

    def _inputs(self) -> xr.Dataset:
        made = inputs_dataset(self.items, self.left_out)
        patched = np.zeros((len(self.items), made.sizes["position"]), dtype=np.int8)
        patched[self.cells.base, self.cells.position] = 1
        attrs = {
            "long_name": "1 where paths run in the base prompt (not before the prompts part)", "units": "1",
            "method": "the recipe's positions from the first differing token on",
        }  # fmt: skip
        made["patched"] = (("pair", "position"), patched, attrs)
        return made

    # --- running -----------------------------------------------------------------------------------------------------

    def _block(self, rows: slice) -> Paths:
        """What the senders of a block of pairs change; kept while blocks of receivers use it."""
        if self._paths is None or self._paths[0] != rows:
            self._paths = None  # before the next one is made, not beside it
            tokens = [None if one is None else one[rows] for one in self.tokens]
            made = Paths(
                self.model.runtime, self.bases[rows], self.donors[rows], self.metrics, tokens, self.senders, self.positions,
                self.budget,
            )  # fmt: skip
            self._paths = (rows, made)
        return self._paths[1]

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Patch every path of one block of pairs and receivers."""
        region = unit.regions[f"effects/{GROUP}"]
        paths = self._block(region["pair"])
        found = paths.run(self.receivers[region["receiver"]], progress)
        effects: dict[str, np.ndarray] = {}
        for number, metric in enumerate(self.metrics):
            warn_nonfinite(metric.name, found.values[number], found.fired >= 0, lambda at: self._cell(region, at))
            base, donor = (values[number].astype(np.float64) for values in (paths.base, paths.donor))
            scale = np.where(np.abs(donor - base) < _TINY, np.nan, donor - base)[:, None, None]
            effects[metric.name] = found.values[number]
            effect = (found.values[number].astype(np.float64) - base[:, None, None]) / scale + 0.0  # no negative zeros
            effects["effect" if number == 0 else f"effect_{metric.name}"] = effect.astype(np.float32)
        receipts = {"change_norm": found.change, "fired": found.fired.astype(np.int32)}
        values: dict[str, dict[str, np.ndarray]] = {f"effects/{GROUP}": effects, f"receipts/{GROUP}": receipts}
        if "baseline" in unit.regions:
            runs = {"clean": paths.base, "corrupt": paths.donor}
            if self.recipe.mode == "denoising":
                runs = {"clean": paths.donor, "corrupt": paths.base}
            values["baseline"] = {
                f"{metric.name}_{run}": held[number].astype(np.float32)
                for run, held in runs.items()
                for number, metric in enumerate(self.metrics)
            }
        return values

    def _cell(self, region: Mapping[str, slice], at: tuple[int, ...]) -> str:
        """A path for people."""
        receiver = self.receivers[region["receiver"]][at[2]]
        return f"{self.senders[at[1]].label} to {receiver.label} in {self.items[region['pair']][at[0]].name}"


def prepare(model: Model, recipe: PathPatchingRecipe) -> PathJob:
    """Check a recipe against a model and describe the run; nothing is written and no path is patched."""
    return PathJob(model, recipe)


def path_patching(
    model: Model,
    pairs: str | Pair | Sequence[Pair] | Sequence[Mapping[str, Any]],
    *,
    senders: str | Sequence[str] = ("z[*][*]", "mlp_out[*]"),
    receivers: str | Sequence[str] = ("logits",),
    mode: str = "noising",
    positions: Any = "all",
    metric: Any = "logit_diff",
    memory: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> xr.DataTree:
    """Path patching from Python: the recipe's keys as arguments, the recipe's results.

    Args:
        model: a loaded model.
        pairs: one pair, or several, from `nsp.pair` (or mappings with its arguments), or the name of a built-in set.
        senders, receivers, mode, positions, metric: as in the recipe.
        memory: budget, such as ``4GB``.
        out: where to keep the run as a store; None keeps it in memory alone.

    Returns a tree with ``effects/paths`` (dims pair, sender, receiver), ``receipts/paths``, ``baseline`` and ``inputs``.
    """
    given: Any = pairs if isinstance(pairs, str) else as_list(pairs)
    recipe = checked(
        PathPatchingRecipe,
        {
            "kind": KIND,
            "pairs": given if isinstance(given, str) else [pair_keys(one) for one in given],
            "mode": mode,
            "senders": as_list(senders),
            "receivers": as_list(receivers),
            "positions": positions,
            "metric": metric,
            "memory": memory,
        },
    )
    return runner.results(prepare(model, recipe), out=out, force=force, progress=progress)


register(Experiment(KIND, PathPatchingRecipe, prepare, summarise, panels=panels))
