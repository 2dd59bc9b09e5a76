"""Patch sites between prompts of the two sets, with the behaviour's score as the metric.

Prompt i of the positive set is paired with prompt i of the negative one. ``denoising`` puts the positive prompt's value
at a site into the negative one's run (is the site enough to bring the behaviour about?), ``noising`` the other way round
(is it needed?). Prompts differ in length, so the positions are those after the instruction, which all prompts share.
``effect`` is (patched - base) / (donor - base) of the score: 0 at the base run, 1 at the donor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nsp.datasets.prompts import Prompt
from nsp.engine.engine import Engine
from nsp.engine.lowering import Resolved, resolve
from nsp.engine.planning import choose_path
from nsp.engine.request import Request
from nsp.errors import InputError
from nsp.experiments.direction.prompts import SPAN, Divided
from nsp.experiments.direction.recipe import SiteOptions
from nsp.experiments.direction.scores import SCORE, SCORE_NAME, SCORE_UNITS, Opening
from nsp.experiments.labels import Group, Variable, index_coord
from nsp.interventions import patch
from nsp.metrics import Metric
from nsp.model import Model
from nsp.progress import BranchProgress
from nsp.results import axis_coords, effect_attrs, normalised
from nsp.sites import COMPONENTS, Site
from nsp.trace import default_axes


@dataclass(frozen=True, eq=False)
class SiteSweep:
    """One component patched in one mode.

    Attributes:
        name: its group below ``effects`` and ``receipts``.
        mode: ``denoising`` or ``noising``.
        request: what runs; ``item`` the site on this model.
    """

    name: str
    mode: str
    request: Request
    item: Resolved

    @property
    def unit_name(self) -> str:
        return self.item.site.spec.dim

    @property
    def dims(self) -> tuple[str, ...]:
        named = {"layer": "layer", "position": "position", "unit": self.unit_name}
        return ("pair", *(named[axis] for axis in self.request.axes))


def site_sweeps(model: Model, divided: Divided, options: SiteOptions, openings: Sequence[Opening]) -> list[SiteSweep]:
    """The sweeps of every component and mode, on the test part's pairs."""
    high, low = divided.of("test", "positive"), divided.of("test", "negative")
    count = min(options.pairs, len(high), len(low))
    sweeps = []
    for component in options.components:
        units = "*" if options.heads and COMPONENTS[component].has_heads else None
        site = Site.of(component, options.layers, units, SPAN)
        for mode in options.modes:
            bases, donors = (low, high) if mode == "denoising" else (high, low)
            request = _request(site, bases[:count], donors[:count], openings)
            item = resolve(model.runtime, site, request.bases)
            sweeps.append(SiteSweep(f"{component}-{mode}", mode, request, item))
    return sweeps


def _request(site: Site, bases: tuple[Prompt, ...], donors: tuple[Prompt, ...], openings: Sequence[Opening]) -> Request:
    if not bases:
        raise InputError("patch: the test part has no pair of prompts; give more prompts")
    return Request(
        bases=bases,
        swept=(patch(site, donor=donors),),
        axes=default_axes(site),
        reference=donors,
        metrics=(Metric("log_odds", name=SCORE),),
        tokens=(torch.tensor([[opening.token_id for opening in openings]] * len(bases)),),
    )


def effects_group(model: Model, sweep: SiteSweep) -> Group:
    """What a sweep fills: the score and its normalised form at each site, and the scores of both runs."""
    path, reason = choose_path(model.runtime, sweep.request)
    method = f"patch {sweep.item.site}, {sweep.mode}: one exact counterfactual a cell; {path} path"
    changed = "L2 norm of what the patch changed at the site"
    variables = {
        SCORE: Variable(sweep.dims, SCORE_NAME, SCORE_UNITS, method),
        "effect": Variable(sweep.dims, **effect_attrs(sweep.request.metrics[0], method)),
        "change_norm": Variable(sweep.dims, changed, "activation", method),
    }
    for end in ("base", "donor"):
        variables[f"{SCORE}_{end}"] = Variable(
            ("pair",), f"{SCORE_NAME}, {end} run", SCORE_UNITS, "ordinary forward pass"
        )
    last = range(-len(sweep.item.positions[0]), 0)
    coords: dict[str, Any] = {
        "pair": index_coord("pair", len(sweep.request.bases), "pair of test prompts, from 0"),
        **axis_coords(sweep.item, sweep.request.axes, sweep.request.bases, "pair", sweep.unit_name),
        "position": index_coord("position", last, "position, from the end of the prompt"),
    }
    attrs = {"site": str(sweep.item.site), "mode": sweep.mode, "path": path, "path_reason": reason}
    return Group(variables, coords, attrs)


def run_sweep(engine: Engine, sweep: SiteSweep, progress: BranchProgress | None = None) -> dict[str, np.ndarray]:
    """The arrays of `effects_group`, computed."""
    measured = engine.measure(engine.plan(sweep.request), progress=progress)
    assert measured.reference is not None
    keep = (slice(None), *(slice(None) if axis in sweep.request.axes else 0 for axis in ("layer", "position", "unit")))
    return {
        SCORE: measured.values[0][keep],
        "effect": normalised(measured, 0)[keep],
        "change_norm": measured.change[keep],
        f"{SCORE}_base": measured.base[0],
        f"{SCORE}_donor": measured.reference[0],
    }
