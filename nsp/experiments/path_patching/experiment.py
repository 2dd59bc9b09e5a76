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

Cost: one counterfactual per path, run by the engine's branch path from the receiver's layer on; the changes and the
receivers' values take a few passes per layer (see `nsp.experiments.path_patching.runs`).

Limits: one hop. Everything between is frozen, MLPs too (Wang et al. let MLPs run on), so an effect that goes through a
third component is none of this path's; effects of paths do not add up. Where a family puts a norm behind attention
(Gemma 2, OLMo 2), a head's delta is what the normed attention output changes by when this head alone changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

from nsp.engine.estimates import Estimate
from nsp.engine.selfcheck import ensure_checked
from nsp.errors import InputError
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
from nsp.experiments.labels import Group, Variable, given_variable, index_coord, text_coord
from nsp.experiments.nonfinite import warn_nonfinite
from nsp.experiments.path_patching.nodes import Node, check_stream, receivers_of, senders_of
from nsp.experiments.path_patching.recipe import PathPatchingRecipe
from nsp.experiments.path_patching.runs import Paths, cells_of, measured_bases, path_branches
from nsp.results import normalised_effect
from nsp.sites import Selection

EFFECTS, RECEIPTS = "effects/paths", "receipts/paths"
# One unit of work: what is lost at most when a run is killed.
_UNIT_FLOP = 4e12
# Bytes of what all senders change in one block of pairs.
_CHANGE_BYTES = 512 * 2**20
_DIMS = ("pair", "sender", "receiver")


class PathPatching(Experiment[PathPatchingRecipe]):
    """A path-patching run: pairs encoded and aligned, senders and receivers found."""

    results = (
        "``effects/paths`` (each metric and ``effect``, its normalised form: 0 at the base run, 1 at the donor run; NaN where "
        "there is no path) and ``receipts/paths``, both (pair, sender, receiver); ``baseline`` (pair); ``inputs``"
    )

    def prepare(self) -> None:
        recipe, runtime = self.recipe, self.model.runtime
        check_stream(self.model.geometry)
        ensure_checked(runtime)
        self.metrics = recipe.metrics()
        made = recipe.make_pairs(self.model.tokenizer)
        self.left_out = made.dropped
        self.runs = paired_runs(self.model, made.pairs, recipe.mode, self.metrics)
        self.bases, self.donors = [run.base for run in self.runs], [run.donor for run in self.runs]
        self.tokens = [metric_tokens(self.model, metric, self.runs) for metric in self.metrics]
        self.senders = senders_of(runtime, recipe.senders)
        self.receivers = receivers_of(runtime, recipe.receivers)
        self.positions = Selection.of(recipe.positions)
        self.cells = cells_of(self.bases, self.donors, self.positions)
        self._changed: tuple[slice, Paths] | None = None
        if self.estimate.branches + self.estimate.pruned == 0:
            raise InputError(
                f"no sender reaches a receiver: {', '.join(recipe.senders)} come after {', '.join(recipe.receivers)}"
            )

    # --- description ------------------------------------------------------------------------------------------------

    def statement(self) -> dict[str, Any]:
        pairs = [
            {"base": list(run.base.token_ids), "donor": list(run.donor.token_ids), "tokens": list(run.tokens)}
            for run in self.runs
        ]
        return {
            "mode": self.recipe.mode,
            "pairs": pairs,
            "cells": np.stack([self.cells.base, self.cells.position, self.cells.donor], axis=1).tolist(),
            "senders": [node.label for node in self.senders],
            "receivers": [node.label for node in self.receivers],
            "metrics": [metric.to_dict() for metric in self.metrics],
        }

    def estimates(self) -> Iterable[Estimate]:
        return [self.estimate]

    @cached_property
    def estimate(self) -> Estimate:
        """The cost from the first pair, times the pairs."""
        cells = cells_of(self.bases[:1], self.donors[:1], self.positions)
        tokens = [None if ids is None else ids[:1] for ids in self.tokens]
        first = measured_bases(self.engine, self.bases[:1], self.donors[:1], self.metrics, tokens)
        groups: dict[tuple[int, int], list[Node]] = {}
        for node in self.receivers:
            groups.setdefault((node.place, node.layer), []).append(node)
        parts = [
            self.engine.estimate(path_branches(first, cells, self.senders, group, {})[1])
            for _, group in sorted(groups.items())
        ]
        count, kept = len(self.bases), self._pairs_at_once * self._change_bytes
        names = ("branches", "pruned", "passes", "tokens", "token_layers", "naive_token_layers", "work", "flop", "seconds")
        total = {name: sum(getattr(part, name) for part in parts) * count for name in names}
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

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        path, reason = _path(self.model.runtime.branch_refusal)
        donor = "corrupt" if self.recipe.mode == "noising" else "clean"
        method = f"direct path patched from the {donor} run, all between frozen; {path} path"
        note = "NaN where the sender comes after the receiver: there is no path"
        coords = {"pair": pair_coord(self.runs), **_node_coords("sender", self.senders), **_node_coords("receiver", self.receivers)}
        reported = f"reported by the engine, {path} path"
        change = "L2 norm of what the path changed at the receiver (for logits: in the final residual stream)"
        fired = "writes made (0: effect exactly zero by construction; -1: no path, or not computed)"
        receipts = {
            "change_norm": Variable(_DIMS, change, "activation", reported),
            "fired": Variable(_DIMS, fired, "1", reported, np.int32),
        }
        return {
            "inputs": self._inputs(),
            "baseline": baseline_group(self.metrics, self.runs),
            EFFECTS: Group(metric_variables(self.metrics, _DIMS, method), coords, {"mode": self.recipe.mode, "note": note}),
            RECEIPTS: Group(receipts, coords, {"path": path, "path_reason": reason}),
        }

    def _inputs(self) -> xr.Dataset:
        inputs = inputs_dataset(self.runs, self.left_out)
        patched = np.zeros((len(self.runs), inputs.sizes["position"]), dtype=np.int8)
        patched[self.cells.base, self.cells.position] = 1
        meaning = "1 where paths run in the base prompt (not before the prompts part)"
        method = "the recipe's positions from the first differing token on"
        return inputs.assign(patched=given_variable(("pair", "position"), patched, meaning, method))

    # --- running ----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        """One stage, in blocks of pairs, and of receivers where one block of pairs is a lot of work."""
        each, receivers = self.estimate.work / len(self.bases), len(self.receivers)
        pairs = max(1, min(self._pairs_at_once, int(_UNIT_FLOP / max(each, 1.0))))
        parts = min(receivers, max(1, round(each * pairs / _UNIT_FLOP)))
        return [Stage(self._run, (EFFECTS, RECEIPTS, "baseline"), {"pair": pairs, "receiver": -(-receivers // parts)})]

    def _run(self, region: Region, stored: Stored) -> Values:
        rows, receivers = region.blocks["pair"], self.receivers[region.blocks["receiver"]]
        paths = self._changes(rows)
        patched = paths.run(receivers, region.progress)

        def cell(at: tuple[int, ...]) -> str:
            return f"{self.senders[at[1]].label} to {receivers[at[2]].label} in {self.runs[rows][at[0]].name}"

        effects: dict[str, np.ndarray] = {}
        for number, metric in enumerate(self.metrics):
            values = patched.values[number]
            warn_nonfinite(metric.name, values, patched.fired >= 0, cell)
            effects[metric.name] = values
            effect = normalised_effect(values, paths.base[number], paths.donor[number])
            effects[effect_name(number, metric)] = effect + np.float32(0.0)  # no negative zeros
        return {
            EFFECTS: effects,
            RECEIPTS: {"change_norm": patched.change, "fired": patched.fired},
            "baseline": baseline_values(self.metrics, self.runs[rows], paths.base, paths.donor),
        }

    def _changes(self, rows: slice) -> Paths:
        """What the senders of a block of pairs change; kept while blocks of receivers use it."""
        if self._changed is None or self._changed[0] != rows:
            self._changed = None  # before the next one is made, not beside it
            tokens = [None if ids is None else ids[rows] for ids in self.tokens]
            paths = Paths(
                self.engine, self.bases[rows], self.donors[rows], self.metrics, tokens, self.senders, self.positions
            )  # fmt: skip
            self._changed = (rows, paths)
        return self._changed[1]


def _path(refusal: str) -> tuple[str, str]:
    """The engine's path, and why."""
    return ("plain", refusal) if refusal else ("branch", "attention is causal and the self-check passed")


def _node_coords(dim: str, nodes: Sequence[Node]) -> dict[str, xr.Variable]:
    heads = [-1 if node.unit is None else node.unit for node in nodes]
    return {
        dim: text_coord(dim, [node.label for node in nodes], f"{dim} of a path"),
        f"{dim}_layer": index_coord(dim, [node.layer for node in nodes], f"layer of the {dim}"),
        f"{dim}_head": index_coord(dim, heads, f"head of the {dim} (-1: the whole component)"),
    }
