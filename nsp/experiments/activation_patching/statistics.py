"""How the effects of an activation-patching run are judged, from what its store holds.

Tests are of the *change* that a patch makes to the metric (patched - base, in the metric's units), intervals of the
normalised effect. Dividing each pair by its own donor - base difference gives pairs with a small difference heavy tails
and a sign of their own, so that normalised effects need not be symmetric where nothing is carried; changes are. All
components of a run are one family of sites. In an interchange the two directions of a pair are one observation: their
effects are averaged, and changes are counted towards the clean run. Sites with a value that is NaN or infinite are in
no family and have no mean; they are named instead.

The control of a selection is made on other pairs: sites are selected on one part of the pairs, and on the other part
the selected set is compared with random sets of as many sites of the same components (`nsp.statistics.matched_nulls`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from nsp.experiments.activation_patching.recipe import StatisticsOptions
from nsp.metrics import METRICS
from nsp.statistics import average_pairs, matched_nulls, mean_effects, sign_flip_tests, split_pairs

# Of the pairs on which sites are selected for the null, where the recipe has no split of its own.
_HALF = 0.5
_NAMED = 3


@dataclass(frozen=True)
class Judgement:
    """What the statistics say of a run.

    Attributes:
        sites: for each component a Dataset with the site's dims: ``mean``, ``low``, ``high``, ``n`` of the effect,
            ``p``, ``p_corrected``, ``significant``, ``tested`` of the change.
        pairs: independent observations; ``note``: why no site could be significant, or empty.
        held_out: the same of the sites selected on one part of the pairs, from the others, with ``selected``; empty
            with fewer than two pairs. ``select_pairs``, ``estimate_pairs``: the sizes of the parts.
        null: the selected set among random sets, on the held-out pairs; None where no site was selected.
        wrong: sites with values that are NaN or infinite, for people.
    """

    sites: dict[str, xr.Dataset]
    pairs: int
    note: str
    wrong: list[str]
    held_out: dict[str, xr.Dataset] = field(default_factory=dict)
    select_pairs: int = 0
    estimate_pairs: int = 0
    null: xr.Dataset | None = None

    @property
    def tested(self) -> int:
        return sum(int(one["tested"].sum()) for one in self.sites.values())

    @property
    def significant(self) -> int:
        return sum(int(one["significant"].sum()) for one in self.sites.values())

    @property
    def selected(self) -> int:
        return sum(int(one["selected"].sum()) for one in self.held_out.values())


def first_metric(tree: xr.DataTree) -> tuple[str, str]:
    """The name and kind of the metric that ``effect`` is about."""
    given = tree.attrs["recipe_resolved"]["metric"][0]
    return str(given["name"] or given["kind"]), str(given["kind"])


def judge(tree: xr.DataTree, options: StatisticsOptions | None = None, split: float | None = None) -> Judgement:
    """The statistics of a run; ``options`` and ``split`` as in its recipe, or others."""
    chosen = options or StatisticsOptions()
    effects: dict[str, xr.DataArray] = {}
    changes: dict[str, xr.DataArray] = {}
    wrong: list[str] = []
    for name in tree["effects"].children:
        effects[name], changes[name], bad = _pair_values(tree, name)
        wrong += bad
    pairs = next(iter(effects.values())).sizes["pair"]
    test: dict[str, Any] = {
        "correction": chosen.correction, "level": chosen.alpha, "resamples": chosen.resamples, "seed": chosen.seed
    }  # fmt: skip
    interval: dict[str, Any] = {"confidence": chosen.confidence, "resamples": chosen.bootstrap, "seed": chosen.seed}
    tests = sign_flip_tests(changes, **test)
    sites = {name: _together(mean_effects(effect, **interval), tests[name]) for name, effect in effects.items()}
    note = str(next(iter(tests.values())).attrs["note"])
    if pairs < 2:
        return Judgement(sites, pairs, note, wrong)
    fraction = _HALF if split is None else split
    first, second = _parts(changes, fraction, chosen.seed)
    _, held = _parts(effects, fraction, chosen.seed)
    selected = {name: one["significant"] for name, one in sign_flip_tests(first, **test).items()}
    kept = {name: second[name].where(one) for name, one in selected.items()}
    again = sign_flip_tests(kept, **test)
    held_out = {
        name: _together(mean_effects(held[name].where(one), **interval), again[name]).assign(selected=one)
        for name, one in selected.items()
    }
    null = None
    if any(bool(one.any()) for one in selected.values()):
        null = matched_nulls(held, selected, level=chosen.alpha, seed=chosen.seed)
    sizes = [next(iter(part.values())).sizes["pair"] for part in (first, second)]
    return Judgement(sites, pairs, note, wrong, held_out, sizes[0], sizes[1], null)


def _together(estimate: xr.Dataset, test: xr.Dataset) -> xr.Dataset:
    """Mean effects with the tests of the same sites; ``n`` stays that of the effect."""
    tested = {name: test[name] for name in ("p", "p_corrected", "significant", "tested")}
    return estimate.assign(tested).assign_attrs({**estimate.attrs, **test.attrs})


def _parts(
    arrays: Mapping[str, xr.DataArray], fraction: float, seed: int
) -> tuple[dict[str, xr.DataArray], dict[str, xr.DataArray]]:
    made = {name: split_pairs(array, fraction=fraction, seed=seed) for name, array in arrays.items()}
    return {name: parts[0] for name, parts in made.items()}, {name: parts[1] for name, parts in made.items()}


def _pair_values(tree: xr.DataTree, group: str) -> tuple[xr.DataArray, xr.DataArray, list[str]]:
    """Effects and changes of one component, dims (pair, ...), and the sites whose values are not finite."""
    metric, kind = first_metric(tree)
    dataset = tree[f"effects/{group}"].to_dataset()
    bases = tree["inputs"].to_dataset()["base"].values
    baseline = tree["baseline"].to_dataset()
    base = np.where(bases == "clean", baseline[f"{metric}_clean"].values, baseline[f"{metric}_corrupt"].values)
    raw, effect = dataset[metric].astype(np.float64), dataset["effect"].astype(np.float64)
    ran = xr.DataArray(tree[f"receipts/{group}"].to_dataset()["fired"].values >= 0, dims=raw.dims)
    bad = ran & ~np.isfinite(raw)
    fine = ~bad.any("pair")
    change = raw - xr.DataArray(base.astype(np.float64), dims=["pair"])
    change.attrs = {"long_name": f"change of {metric}", "units": dataset[metric].attrs.get("units", "1")}
    effect, change = effect.where(fine), change.where(fine)
    if tree.attrs["recipe_resolved"]["mode"] == "interchange":
        # The two directions of a pair stand next to each other.
        labels = [number // 2 for number in range(len(bases))]
        towards = np.where(bases == "clean", -1.0, 1.0) if not _is_agreement(kind) else np.ones(len(bases))
        change = (change * xr.DataArray(towards, dims=["pair"])).assign_attrs(change.attrs)
        effect, change = average_pairs(effect, labels), average_pairs(change, labels)
    return effect, change, _named(tree, group, bad, raw)


def _is_agreement(kind: str) -> bool:
    """Whether a metric says how near a run is to the donor's: patches move it one way in both directions."""
    return METRICS[kind].reference and not METRICS[kind].change


def _named(tree: xr.DataTree, group: str, bad: xr.DataArray, raw: xr.DataArray) -> list[str]:
    cells = np.argwhere(bad.values)
    names = tree["inputs"].to_dataset()["pair_name"].values
    words = []
    for cell in cells[:_NAMED]:
        at = dict(zip(map(str, raw.dims), cell, strict=True))
        place = ", ".join(f"{dim} {int(raw[dim].values[index])}" for dim, index in at.items() if dim != "pair")
        words.append(f"{group}: {place} ({names[at['pair']]})")
    if len(cells) > _NAMED:
        words.append(f"{len(cells) - _NAMED} more of {group}")
    return words
