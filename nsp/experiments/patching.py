"""Activation patching: which sites carry the difference between two prompts?

The model: a pair of prompts that differ in what matters. A site's value from one run replaces its value in the
    other, and a metric of
the next-token distribution says how much of the difference comes along. ``denoising`` patches the clean run's value
into the corrupt run (is the site sufficient to restore the answer?), ``noising`` the corrupt run's into the clean one
(is it necessary?), ``interchange`` goes both ways.

Sign: ``effect`` is (patched - base) / (donor - base), so 0 is the base run and 1 the donor run in every mode.

Cost: one counterfactual a site, run by the engine's branch path (see `nsp.engine`), not one forward pass a site.

Limits: patching needs prompts whose tokens correspond. An effect says that a site carries the difference between
    *these two* prompts; it
does not say what the site computes on others. Vig et al. 2020; Meng et al. 2022; Heimersheim and Nanda 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr

from nsp.datasets.pairs import Pair
from nsp.datasets.prompts import Prompt
from nsp.datasets.tokens import single_token
from nsp.engine.budget import Budget
from nsp.engine.lowering import Resolved, resolve
from nsp.engine.plan import Plan
from nsp.engine.schedule import Estimate, Schedule, estimate
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.sweep import Outcome, PromptDonors, Request, choose_path, run_request
from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.patching_recipe import ActivationPatchingRecipe
from nsp.experiments.registry import Experiment, register
from nsp.experiments.summary import Summary, SummaryTable
from nsp.interventions import patch
from nsp.metrics import METRICS, Metric
from nsp.model import Model
from nsp.results import axis_coords, effect_attrs, normalised, unit_dim
from nsp.sites import Site
from nsp.trace import default_axes

KIND = "activation-patching"
# One unit of work: what is lost at most when a run is killed.
_UNIT_FLOP = 4e12
_TOP = 15


@dataclass(frozen=True)
class Item:
    """One base run with its donor, in the order of the ``pair`` dim."""

    name: str
    base: Prompt
    donor: Prompt
    base_name: str  # "clean" or "corrupt"
    tokens: tuple[int, ...]  # answer, distractor


@dataclass(frozen=True)
class Sweep:
    """One swept selector: its group in the store, its site, and which axes are separate."""

    group: str
    site: Site
    axes: tuple[str, ...]


class PatchingJob:
    """An activation-patching run, prepared: every selector resolved, every pair encoded and aligned, nothing run yet.
    """

    def __init__(self, model: Model, recipe: ActivationPatchingRecipe) -> None:
        self.model, self.recipe = model, recipe
        self.metrics = recipe.metrics()
        made = recipe.make_pairs(model.tokenizer)
        self.items = _items(model, recipe, made.pairs)
        self.left_out = made.dropped
        self.sweeps = _sweeps(recipe)
        self.budget = Budget.of(recipe.memory_bytes, model.runtime.device)
        ensure_checked(model.runtime)
        prompts = [item.base for item in self.items]
        self.resolved: list[Resolved] = [resolve(model.runtime, sweep.site, prompts) for sweep in self.sweeps]
        self.estimates = [self._estimate(sweep) for sweep in self.sweeps]

    # --- description ------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Plan:
        """The plan; its statement is what the recipe comes to: token ids, resolved sites, metrics."""
        metrics = [metric.to_dict() for metric in self.metrics]
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
            for item in self.items
        ]
        model = asdict(self.model.provenance)
        del model["device"]
        statement = {"mode": self.recipe.mode, "pairs": pairs, "metrics": metrics, "sweeps": sweeps}
        return Plan(KIND, model, statement, Schedule(tuple(self.estimates)))

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        recipe = self.recipe.model_dump(mode="json", exclude_unset=True)
        return header_of(
            self.plan,
            given=recipe,
            resolved=self.recipe.model_dump(mode="json"),
            device=self.model.provenance.device,
            seeds={"recipe": self.recipe.seed},
        )

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
        parts = min(layers, max(1, round(flop / _UNIT_FLOP))) if "layer" in sweep.axes else 1
        if parts == 1:
            return [(True, None)]
        size = -(-layers // parts)
        return [(low == 0, slice(low, min(low + size, layers))) for low in range(0, layers, size)]

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        tree: dict[str, xr.Dataset] = {"inputs": self._inputs(), "baseline": self._baseline()}
        for sweep, item in zip(self.sweeps, self.resolved, strict=True):
            tree[f"effects/{sweep.group}"] = self._effects(sweep, item)
            tree[f"receipts/{sweep.group}"] = self._receipts(sweep, item)
        return xr.DataTree.from_dict(tree)

    def _dims(self, sweep: Sweep, item: Resolved) -> tuple[tuple[str, ...], tuple[int, ...]]:
        names = {"layer": "layer", "position": "position", "unit": unit_dim(sweep.site.component)}
        sizes = {"layer": len(item.layers), "position": max(map(len, item.positions)), "unit": len(item.unit_rows)}
        axes = [axis for axis in ("layer", "position", "unit") if axis in sweep.axes]
        return ("pair", *(names[axis] for axis in axes)), (len(self.items), *(sizes[axis] for axis in axes))

    def _coords(self, sweep: Sweep, item: Resolved) -> dict[str, Any]:
        prompts = [one.base for one in self.items]
        return {
            "pair": self._pair_coord(),
            **axis_coords(item, sweep.axes, prompts, "pair", unit_dim(sweep.site.component)),
        }

    def _pair_coord(self) -> xr.Variable:
        return xr.Variable(("pair",), np.arange(len(self.items)), {"long_name": "pair of prompts, from 0"})

    def _effects(self, sweep: Sweep, item: Resolved) -> xr.Dataset:
        dims, shape = self._dims(sweep, item)
        blank = np.full(shape, np.nan, dtype=np.float32)
        path, _ = choose_path(self.model.runtime, self._request(sweep, [0]))
        method = f"patch {sweep.site}, {self.recipe.mode}: one exact counterfactual a cell; {path} path"
        variables: dict[str, Any] = {}
        for number, metric in enumerate(self.metrics):
            kind = METRICS[metric.kind]
            variables[metric.name] = (dims, blank, {"long_name": kind.long_name, "units": kind.units, "method": method})
            name = "effect" if number == 0 else f"effect_{metric.name}"
            variables[name] = (dims, blank, effect_attrs(metric, method))
        attrs = {"site": str(sweep.site), "mode": self.recipe.mode}
        if sweep.site.component == "resid_post" and "position" not in sweep.axes:
            attrs["note"] = (
                "resid_post at all positions is always a full recovery: everything later is computed from it"
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
        return xr.Dataset(variables, {"pair": self._pair_coord()})

    def _inputs(self) -> xr.Dataset:
        width = max(len(prompt) for item in self.items for prompt in (item.base, item.donor))
        method = {"units": "1", "method": "given, encoded by the model's tokenizer"}
        variables: dict[str, Any] = {}
        for run in ("clean", "corrupt"):
            prompts = [item.base if item.base_name == run else item.donor for item in self.items]
            ids = np.full((len(prompts), width), -1, dtype=np.int64)
            texts = np.full((len(prompts), width), "", dtype=object)
            for row, prompt in enumerate(prompts):
                ids[row, : len(prompt)] = prompt.token_ids
                texts[row, : len(prompt)] = prompt.token_texts
            whole = np.array([prompt.text or "".join(prompt.token_texts) for prompt in prompts], dtype=object)
            variables[f"text_{run}"] = (("pair",), whole, {"long_name": f"{run} prompt", **method})
            variables[f"token_id_{run}"] = (
                ("pair", "position"),
                ids,
                {"long_name": f"token ids of the {run} prompt (-1: none)", **method},
            )
            variables[f"token_text_{run}"] = (
                ("pair", "position"),
                texts,
                {"long_name": f"tokens of the {run} prompt", **method},
            )
            lengths = np.array([len(prompt) for prompt in prompts])
            variables[f"n_tokens_{run}"] = (
                ("pair",),
                lengths,
                {"long_name": f"length of the {run} prompt in tokens", **method},
            )
        tokens = np.full((len(self.items), 2), -1, dtype=np.int64)
        for row, item in enumerate(self.items):
            tokens[row, : len(item.tokens)] = item.tokens
        variables["answer_id"] = (("pair",), tokens[:, 0], {"long_name": "token id of the answer (-1: none)", **method})
        variables["distractor_id"] = (
            ("pair",),
            tokens[:, 1],
            {"long_name": "token id of the distractor (-1: none)", **method},
        )
        names = np.array([item.name for item in self.items], dtype=object)
        variables["pair_name"] = (("pair",), names, {"long_name": "name of the pair", **method})
        bases = np.array([item.base_name for item in self.items], dtype=object)
        variables["base"] = (
            ("pair",),
            bases,
            {"long_name": "which prompt is the base run (the other one is the donor)", **method},
        )
        coords = {
            "pair": self._pair_coord(),
            "position": xr.Variable(("position",), np.arange(width), {"long_name": "position"}),
        }
        attrs: dict[str, Any] = {}
        if self.left_out:
            attrs = {
                "left_out": len(self.left_out),
                "left_out_items": [f"{text!r}: {reason}" for text, reason in self.left_out],
            }
        return xr.Dataset(variables, coords, attrs)

    # --- running ----------------------------------------------------------------------------------------------------

    def _request(self, sweep: Sweep, rows: Sequence[int], layers: slice | None = None) -> Request:
        items = [self.items[row] for row in rows]
        site = sweep.site
        if layers is not None:
            chosen = self.resolved[self.sweeps.index(sweep)].layers[layers]
            site = Site.parse(f"{site.component}[{','.join(map(str, chosen))}]").with_(
                units=site.units, positions=site.positions
            )
        donors = tuple(item.donor for item in items)
        return Request(
            bases=tuple(item.base for item in items),
            swept=(patch(site, donor=donors),),
            axes=sweep.axes,
            donors=(PromptDonors(donors),),
            reference=donors,
            metrics=self.metrics,
            tokens=tuple(_tokens_of(self.model, metric, items) for metric in self.metrics),
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
            effects[metric.name] = fitted(outcome.values[number], np.nan, np.float32)
            effects["effect" if number == 0 else f"effect_{metric.name}"] = fitted(
                normalised(outcome, number), np.nan, np.float32
            )
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


def _items(model: Model, recipe: ActivationPatchingRecipe, pairs: Sequence[Pair]) -> list[Item]:
    items = []
    needed = max((METRICS[metric.kind].tokens for metric in recipe.metrics() if not metric.tokens), default=0)
    for number, pair in enumerate(pairs):
        name = pair.name or f"pair {number}"
        items += _pair_items(model, pair, name, recipe.mode, needed)
    return items


def _pair_items(model: Model, pair: Pair, name: str, mode: str, needed: int) -> list[Item]:
    encoded = pair.encode(model.tokenizer)
    tokens = tuple(token for token in (encoded.answer, encoded.distractor) if token is not None)
    if len(tokens) < needed:
        raise InputError(
            f"{pair.label()}: the metric needs an answer{' and a distractor' if needed > 1 else ''}; name them, or take a metric such as kl"
        )
    clean = Item(name, encoded.clean, encoded.corrupt, "clean", tokens)
    corrupt = Item(name, encoded.corrupt, encoded.clean, "corrupt", tokens)
    return {"denoising": [corrupt], "noising": [clean], "interchange": [corrupt, clean]}[mode]


def _sweeps(recipe: ActivationPatchingRecipe) -> list[Sweep]:
    sweeps: list[Sweep] = []
    for site in recipe.selected_sites():
        axes = tuple(axis for axis in default_axes(site) if axis not in recipe.together)
        same = sum(sweep.site.component == site.component for sweep in sweeps)
        sweeps.append(Sweep(site.component if not same else f"{site.component}-{same + 1}", site, axes))
    return sweeps


def _tokens_of(model: Model, metric: Metric, items: Sequence[Item]) -> torch.Tensor | None:
    count = METRICS[metric.kind].tokens
    if count == 0:
        return None
    if metric.tokens:
        ids = [single_token(model.tokenizer, token) for token in metric.tokens]
        return torch.tensor([ids] * len(items))
    return torch.tensor([item.tokens[:count] for item in items])


def prepare(model: Model, recipe: ActivationPatchingRecipe) -> PatchingJob:
    """Check a recipe against a model and describe the run; nothing is written and no sweep runs."""
    return PatchingJob(model, recipe)


def activation_patching(
    model: Model,
    pairs: Pair | Sequence[Pair] | Sequence[Mapping[str, Any]],
    *,
    components: str | Sequence[str] = ("resid_post",),
    sites: Sequence[str] = (),
    mode: Literal["denoising", "noising", "interchange"] = "denoising",
    layers: Any = "all",
    positions: Any = "all",
    heads: Any = None,
    neurons: Any = None,
    together: Sequence[str] = (),
    metric: Any = "logit_diff",
    memory: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool = False,
) -> xr.DataTree:
    """Activation patching from Python: the recipe's keys as arguments, the recipe's results.

    Args:
        model: a loaded model.
        pairs: one pair, or several, from `nsp.pair` (or mappings with its arguments).
        components, sites, mode, layers, positions, heads, neurons, together, metric: as in the recipe.
        memory: budget, such as ``4GB``.
        out: where to keep the run as a store; None keeps it in memory alone.

    Returns a tree with ``effects/<component>``, ``receipts/<component>``, ``baseline`` and ``inputs``.
    """
    given: list[Pair | Mapping[str, Any]] = [pairs] if isinstance(pairs, Pair) else list(pairs)
    recipe = ActivationPatchingRecipe.model_validate(
        {
            "kind": KIND,
            "pairs": [_pair_options(one) for one in given],
            "mode": mode,
            "components": [components] if isinstance(components, str) and components else list(components),
            "sites": list(sites),
            "layers": layers,
            "positions": positions,
            "heads": heads,
            "neurons": neurons,
            "together": list(together),
            "metric": metric,
            "memory": memory,
        }
    )
    job = prepare(model, recipe)
    if out is not None:
        return runner.run(job, out=out, force=force, progress=progress).tree
    return runner.run_in_memory(job)


def _pair_options(pair: Pair | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(pair, Pair):
        return dict(pair)
    spans = {
        name: {"clean": piece[0], "corrupt": piece[1]} if isinstance(piece, tuple) else piece for name, piece in pair.spans
    }
    plain = {"clean": pair.clean, "corrupt": pair.corrupt, "answer": pair.answer, "distractor": pair.distractor}
    return {**plain, "spans": spans, "name": pair.name}


# --- summary --------------------------------------------------------------------------------------------------------


def summarise(tree: xr.DataTree) -> Summary:
    """Baselines and the strongest sites of a run, from its store."""
    attrs = tree.attrs
    recipe = attrs.get("recipe_resolved", {})
    metric = _first_metric(tree)
    baseline = tree["baseline"].to_dataset()
    inputs = tree["inputs"].to_dataset()
    pairs = int(inputs.sizes["pair"])
    clean, corrupt = (float(baseline[f"{metric}_{run}"].mean()) for run in ("clean", "corrupt"))
    model = attrs.get("model", {})
    lines = [
        f"model {model.get('name', '?')} ({model.get('dtype', '?')}), {pairs} pair(s), mode {recipe.get('mode', '?')}",
        f"{metric}: clean {clean:.4f}, corrupt {corrupt:.4f}" + (" (means over pairs)" if pairs > 1 else ""),
    ]
    if "left_out" in inputs.attrs:
        items = list(inputs.attrs["left_out_items"])
        lines.append(f"{len(items)} item(s) of the set failed the token checks and were left out, such as {items[0]}")
    tables = []
    for name, node in tree["effects"].children.items():
        dataset = node.to_dataset(inherit=True)
        tables.append(_top_table(name, dataset, metric, pairs))
        receipts = tree[f"receipts/{name}"].to_dataset()
        fired = receipts["fired"].values
        lines.append(
            f"{name}: {int((fired > 0).sum())} counterfactuals ran on the {receipts.attrs.get('path', '?')} path, "
            f"{int((fired == 0).sum())} are exactly zero by construction"
        )
        if "note" in dataset.attrs:
            lines.append(f"{name}: {dataset.attrs['note']}")
    if pairs == 1:
        lines.append("one pair gives effects and no significance")
    return Summary(f"activation patching, {recipe.get('mode', '?')}", tuple(lines), tuple(tables))


def _first_metric(tree: xr.DataTree) -> str:
    dataset = next(iter(tree["effects"].children.values())).to_dataset()
    return str(next(name for name in dataset.data_vars if not str(name).startswith("effect")))


def _top_table(name: str, dataset: xr.Dataset, metric: str, pairs: int) -> SummaryTable:
    effect = dataset["effect"]
    mean = effect.mean("pair", skipna=True)
    raw = dataset[metric].mean("pair", skipna=True)
    flat = np.asarray(mean.values).reshape(-1)
    order = np.argsort(-np.abs(np.where(np.isnan(flat), 0.0, flat)), kind="stable")[:_TOP]
    rows = []
    for index in order:
        if np.isnan(flat[index]) or flat[index] == 0:
            continue
        at = dict(zip(map(str, mean.dims), np.unravel_index(index, mean.shape), strict=True))
        labels: list[Any] = [int(dataset[dim].values[place]) for dim, place in at.items()]
        if "position" in at:
            labels.insert(list(at).index("position") + 1, _token(dataset, int(at["position"])))
        rows.append((*labels, float(flat[index]), float(np.asarray(raw.values).reshape(-1)[index])))
    columns = [str(dim) for dim in mean.dims]
    if "position" in columns:
        columns.insert(columns.index("position") + 1, "token")
    what = "strongest sites" + (f", mean over {pairs} pairs" if pairs > 1 else "")
    return SummaryTable(f"{name}: {what}", (*columns, "effect", metric), tuple(rows))


def _token(dataset: xr.Dataset, place: int) -> str:
    texts = dataset["token_text"].isel(position=place).values.reshape(-1)
    distinct = sorted({str(text) for text in texts if text != ""})
    if len(distinct) == 1:
        return repr(distinct[0])
    return f"({len(distinct)} tokens)"


register(Experiment(KIND, ActivationPatchingRecipe, prepare, summarise))
