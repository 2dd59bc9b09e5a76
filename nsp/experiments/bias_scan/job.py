"""Bias scan: where do an aligned model and its base part ways on sentences that express a stereotype?

The model: for each sentence, activations of the aligned model's run are patched into the base model's run of the same
sentence, layer by layer, and KL(aligned || patched base) of the next-token distribution says how much of their
divergence is left. The layer that removes most is the prompt's *star layer* (`nsp.experiments.bias_scan.star`); in it
every single neuron is patched, exactly, and the neurons that remove most over all prompts are *found*. Then the found
neurons are ablated in the base model, and the scan reports what that does to the divergence, to the preference for the
stereotyping sentence of each pair (the CrowS-Pairs score), and to unrelated text (perplexity of neutral sentences): a
neuron that merely breaks the model shows there.

Cost: see `nsp.engine.tworuns`; a prompt of 15 tokens takes 60 counterfactuals for two components of 30 layers, and one
a neuron.

Limits: a divergence between two models is not bias; the star layer says where alignment training changed what the base
computes on these sentences, and nothing about why. CrowS-Pairs is noisy (Blodgett et al. 2021). Nangia et al. 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsp.datasets.bias_pairs import BiasPair, BiasPairs
from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.engine.budget import Budget
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.plan import Plan
from nsp.engine.schedule import Schedule
from nsp.engine.scoring import continuation_logprobs
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.tworuns import TwoRuns
from nsp.experiments import runner
from nsp.experiments.alignment_scan.job import activation_blank, activation_values
from nsp.experiments.alignment_scan.prompts import AlignmentPrompts, alignment_prompts
from nsp.experiments.bias_pair_options import BiasPairsOptions
from nsp.experiments.bias_scan.cost import scan_estimates
from nsp.experiments.bias_scan.panels import panels
from nsp.experiments.bias_scan.prompts import ScanPrompt, scan_inputs, scan_prompts, sentence_ids
from nsp.experiments.bias_scan.recipe import BiasScanRecipe
from nsp.experiments.bias_scan.star import removed_by_layer, star_of, steps
from nsp.experiments.bias_scan.store import blank_tree
from nsp.experiments.bias_scan.summary import headline, summarise
from nsp.experiments.bias_scan.tables import NO_STAR, NOT_COMPUTED, NOT_DRAWN, csv_tables
from nsp.experiments.job import BranchProgress, Unit, UnitValues, header_of
from nsp.experiments.models import load_second
from nsp.experiments.registry import Experiment, register
from nsp.experiments.widths import check_comparable, fit_maps, scan_layers
from nsp.interventions import Intervention, ablate
from nsp.model import Model
from nsp.recipe_errors import checked

KIND = "bias-scan"
# Prompts in one unit of work: what is lost at most when a run is killed.
_BLOCK = 8
_ABLATION_BLOCK = 32
_ALIGNMENT_BLOCK = 16


class BiasScanJob:
    """A bias scan, prepared: both models checked against each other, every sentence encoded and aligned."""

    def __init__(self, aligned: Model, base: Model, recipe: BiasScanRecipe, pairs: BiasPairs | None = None) -> None:
        self.aligned, self.base, self.recipe = aligned, base, recipe
        read = recipe.pairs.read() if pairs is None else pairs
        self.pairs, self.bad = recipe.pairs.select(read, recipe.seed), read.bad
        check_comparable(
            aligned, base, recipe.components, mapped=recipe.map is not None, neurons=recipe.neurons is not None
        )
        self.prompts = scan_prompts(aligned, base, self.pairs)
        self.layers = scan_layers(base, recipe)
        self.own: tuple[Intervention, ...] = tuple(ablate(site, recipe.ablation) for site in recipe.ablate)
        self.budget = Budget.of(recipe.memory_bytes, base.runtime.device)
        ensure_checked(base.runtime)
        self.fixed = FixedInterventions.of(base.runtime, self.own, [item.paired.base for item in self.prompts])
        self.alignment: AlignmentPrompts | None = None
        if recipe.alignment is not None:
            self.alignment = alignment_prompts(aligned, recipe.alignment, self.pairs, recipe.seed)
        self._neurons: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._stored: Callable[[], xr.DataTree] | None = None

    @property
    def cells(self) -> tuple[int, ...]:
        """The layers that stand in the store; layers patched together stand at the last one."""
        return self.layers[-1:] if self.recipe.patch == "together" else self.layers

    # --- description ------------------------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> Plan:
        """The plan; its statement is what the recipe comes to."""
        base, aligned = (asdict(model.provenance) for model in (self.base, self.aligned))
        del base["device"], aligned["device"]
        recipe = self.recipe.model_dump(
            mode="json", exclude={"out", "name", "description", "memory", "model", "models", "pairs"}
        )
        prompts = [
            [list(item.paired.base.token_ids), list(item.scored[1]), item.number, item.side] for item in self.prompts
        ]
        statement = {"aligned": aligned, "recipe": recipe, "prompts": prompts}
        if self.alignment is not None:
            statement["alignment"] = self.alignment.statement()
        return Plan(
            KIND, base, statement, Schedule(scan_estimates(self.base, self.recipe, self.prompts, self.cells))
        )

    @property
    def header(self) -> Mapping[str, Any]:
        """What the store's root says."""
        return header_of(self.plan, self.recipe, self.base.provenance.device)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Blocks of prompts; then, where neurons are found, their ablation in blocks of prompts and on neutral text."""
        units: list[Unit] = []
        groups = ["baseline"]
        groups += [f"{top}/{component}" for component in self.recipe.components for top in ("effects", "receipts")]
        groups += ["effects/mlp_neurons"] if self.recipe.neurons is not None else []
        count = len(self.prompts)
        for block in _blocks(count, _BLOCK):
            units.append(Unit(len(units), {group: {"prompt": block} for group in groups}))
        if self.alignment is not None:
            for block in _blocks(len(self.alignment.prompts), _ALIGNMENT_BLOCK):
                units.append(Unit(len(units), {"activations/mlp_neurons": {"prompt": block}}))
        if self.recipe.neurons is not None:
            units.append(Unit(len(units), {"circuit/found": {}, "effects/neutral": {}}))
            for block in _blocks(count, _ABLATION_BLOCK):
                units.append(Unit(len(units), {"effects/ablation": {"prompt": block}}))
        return tuple(units)

    def template(self) -> xr.DataTree:
        """The store's groups with all labels; results NaN."""
        tree = blank_tree(
            scan_inputs(self.prompts, self.bad),
            self.recipe,
            cells=self.cells,
            neurons=self.base.geometry.d_mlp,
            path="plain" if self.base.runtime.branch_refusal else "branch",
            reason=self.base.runtime.branch_refusal,
            fits=self._fits,
        )
        if self.alignment is not None:
            tree["activations/mlp_neurons"] = activation_blank(self.aligned, self.alignment)
        return xr.DataTree.from_dict(tree)

    # --- running ----------------------------------------------------------------------------------------------------

    def attach(self, stored: Callable[[], xr.DataTree]) -> None:
        """Where finished units can be read from; what another process computed is then not computed again."""
        self._stored = stored

    def run_unit(self, unit: Unit, progress: BranchProgress | None = None) -> UnitValues:
        """Scan a block of prompts, or ablate what was found."""
        if "activations/mlp_neurons" in unit.regions:
            assert self.alignment is not None
            rows = _rows(unit, "activations/mlp_neurons", len(self.alignment.prompts))
            return {"activations/mlp_neurons": activation_values(self.aligned, self.alignment, rows)}
        if "circuit/found" in unit.regions:
            return self._found_unit()
        if "effects/ablation" in unit.regions:
            return self._ablation_unit(
                [self.prompts[row] for row in _rows(unit, "effects/ablation", len(self.prompts))]
            )
        return self._scan_unit(unit, progress)

    @cached_property
    def _drawn(self) -> frozenset[int]:
        """The pairs whose prompts have their neurons patched."""
        assert self.recipe.neurons is not None
        most, count = self.recipe.neurons.prompts, len(self.pairs)
        if most is None or most // 2 >= count:
            return frozenset(range(count))
        return frozenset(np.random.default_rng(self.recipe.seed).permutation(count)[: most // 2].tolist())

    @cached_property
    def _fits(self) -> Mapping[str, Any] | None:
        """Maps between models of other widths, fitted when first needed."""
        return None if self.recipe.map is None else fit_maps(self.aligned, self.base, self.recipe.components)

    def _two(self, items: Sequence[ScanPrompt], components: Sequence[str], everywhere: bool) -> TwoRuns:
        return TwoRuns(
            self.aligned.runtime,
            self.base.runtime,
            [item.paired for item in items],
            self.fixed,
            self.budget,
            components=components,
            everywhere=everywhere,
            maps=None if self._fits is None else self._fits["maps"],
        )

    def _scan_unit(self, unit: Unit, progress: BranchProgress | None) -> UnitValues:
        recipe = self.recipe
        items = [self.prompts[row] for row in _rows(unit, "baseline", len(self.prompts))]
        two = self._two(items, recipe.components, recipe.mean_over_positions)
        unpatched = two.baseline()
        values: dict[str, dict[str, np.ndarray]] = {"baseline": {"kl": unpatched.last[:, 0].astype(np.float32)}}
        if unpatched.mean is not None:
            values["baseline"]["kl_mean"] = unpatched.mean[:, 0].astype(np.float32)
        values["baseline"]["logprob_base"] = self._logprobs(items, self.base, self.fixed)
        same = self.aligned is self.base and not self.own
        values["baseline"]["logprob_aligned"] = (
            values["baseline"]["logprob_base"] if same else self._logprobs(items, self.aligned, None)
        )
        stars: list[int | None] = [None] * len(items)
        for number, component in enumerate(recipe.components):
            found = two.scan(component, self.layers, recipe.patch, progress)
            effects = {"kl": found.last, "delta_kl": found.last.astype(np.float64) - unpatched.last}
            if found.mean is not None and unpatched.mean is not None:
                effects |= {"kl_mean": found.mean, "delta_kl_mean": found.mean.astype(np.float64) - unpatched.mean}
            values[f"effects/{component}"] = {name: value.astype(np.float32) for name, value in effects.items()}
            values[f"receipts/{component}"] = {
                "fired": found.fired.astype(np.int32),
                "change_norm": found.change.astype(np.float32),
            }
            if number == 0:
                removed = removed_by_layer(unpatched.last[:, 0], found.last, stepwise=steps(component, recipe.patch))
                stars = [
                    star_of(float(base), row, self.cells).layer
                    for base, row in zip(unpatched.last[:, 0], removed, strict=True)
                ]
        if recipe.neurons is not None:
            fixed_layer = recipe.neurons.layer
            layers = stars if fixed_layer == "star" else [int(fixed_layer)] * len(items)
            drawn = [item.number in self._drawn for item in items]
            layers = [layer if chosen else None for layer, chosen in zip(layers, drawn, strict=True)]
            part = two.neurons(layers, everywhere=recipe.neurons.positions == "all", progress=progress)
            delta = (part.last - unpatched.last).astype(np.float32)
            at = np.array([NO_STAR if layer is None else layer for layer in layers], dtype=np.int32)
            at[~np.array(drawn)] = NOT_DRAWN
            values["effects/mlp_neurons"] = {"delta_kl": delta, "neuron_layer": at}
            self._neurons[unit.index] = (delta, at)
        return values

    def _logprobs(self, items: Sequence[ScanPrompt], model: Model, fixed: FixedInterventions | None) -> np.ndarray:
        which = 0 if model is self.aligned and fixed is None else 1
        found = continuation_logprobs(
            model.runtime, [item.prefix[which] for item in items], [item.scored[which] for item in items], fixed=fixed
        )
        return np.array([part.sum() for part in found], dtype=np.float64)

    # --- what was found ---------------------------------------------------------------------------------------------

    @cached_property
    def found(self) -> list[tuple[int, int, float]]:
        """(layer, neuron, nats removed) of the neurons that remove most, best first.

        The score is the sum of what a neuron removes over the prompts in whose layer it was patched, over all prompts.
        Where fewer than are asked for remove any, those that add most follow; neurons without any effect are never found.
        """
        assert self.recipe.neurons is not None
        total: dict[int, np.ndarray] = {}
        for delta, at in self._neuron_blocks():
            for row, layer in zip(delta, at, strict=True):
                if layer >= 0:
                    total[int(layer)] = total.get(int(layer), np.zeros(row.shape)) - np.nan_to_num(
                        row.astype(np.float64)
                    )
        scores = [
            (int(layer), neuron, float(score) / (2 * len(self._drawn)))
            for layer, values in sorted(total.items())
            for neuron, score in enumerate(values)
            if score != 0
        ]
        return sorted(scores, key=lambda item: (item[2] < 0, -abs(item[2])))[: self.recipe.neurons.top]

    def _neuron_blocks(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Neuron effects of every block of prompts: kept from this process, read from the store, or computed again."""
        units = [unit for unit in self.units if "effects/mlp_neurons" in unit.regions]
        missing = [unit for unit in units if unit.index not in self._neurons]
        if missing and self._stored is not None:
            dataset = self._stored()["effects/mlp_neurons"].to_dataset()
            for unit in missing:
                part = dataset.isel(prompt=unit.regions["effects/mlp_neurons"]["prompt"])
                at = np.asarray(part["neuron_layer"].values)
                if (at != NOT_COMPUTED).all():
                    self._neurons[unit.index] = (np.asarray(part["delta_kl"].values), at)
        for unit in units:
            if unit.index not in self._neurons:
                self._scan_unit(unit, None)
        return [self._neurons[unit.index] for unit in units]

    @cached_property
    def _ablated(self) -> FixedInterventions:
        """The base model with the found neurons ablated as well."""
        assert self.recipe.neurons is not None
        by_layer: dict[int, list[int]] = {}
        for layer, neuron, _ in self.found:
            by_layer.setdefault(layer, []).append(neuron)
        sites = [
            f"mlp_neurons[{layer}][{','.join(map(str, sorted(units)))}] @ *"
            for layer, units in sorted(by_layer.items())
        ]
        added = [ablate(site, self.recipe.neurons.ablation) for site in sites]
        return FixedInterventions.of(self.base.runtime, (*self.own, *added), [item.paired.base for item in self.prompts])

    def _found_unit(self) -> UnitValues:
        assert self.recipe.neurons is not None
        count = self.recipe.neurons.top
        padded = [*self.found, *[(NOT_COMPUTED, NOT_COMPUTED, float("nan"))] * (count - len(self.found))]
        ids = [sentence_ids(self.base, text) for text in NEUTRAL_SENTENCES]
        prefixes, scored = [one[0] for one in ids], [one[1] for one in ids]
        runs = {"logprob_base": self.fixed, "logprob_ablated": self._ablated}
        neutral = {
            name: np.array(
                [part.sum() for part in continuation_logprobs(self.base.runtime, prefixes, scored, fixed=fixed)]
            )
            for name, fixed in runs.items()
        }
        return {
            "circuit/found": {
                "layer_of": np.array([item[0] for item in padded], dtype=np.int32),
                "neuron_of": np.array([item[1] for item in padded], dtype=np.int32),
                "removed": np.array([item[2] for item in padded], dtype=np.float32),
            },
            "effects/neutral": {**neutral, "n_scored": np.array([len(one) for one in scored], dtype=np.int32)},
        }

    def _ablation_unit(self, items: Sequence[ScanPrompt]) -> UnitValues:
        kl = []
        for block in _blocks(len(items), _BLOCK):
            two = self._two(items[block], (), False)
            kl.append(two.divergence_of(self._ablated))
        return {
            "effects/ablation": {
                "kl": np.concatenate(kl).astype(np.float32),
                "logprob": self._logprobs(items, self.base, self._ablated),
            }
        }


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(low, min(low + size, count)) for low in range(0, count, size)]


def _rows(unit: Unit, group: str, count: int) -> range:
    return range(count)[unit.regions[group]["prompt"]]


def prepare(model: Model, recipe: BiasScanRecipe) -> BiasScanJob:
    """Check a recipe against the base model (and load the aligned one); nothing is scanned."""
    same = recipe.aligned == recipe.model
    aligned = model if same else load_second(recipe.aligned, recipe.backend, model)
    return BiasScanJob(aligned, model, recipe)


def bias_scan(
    aligned: Model,
    base: Model | None = None,
    pairs: str | Path | Sequence[BiasPair] | Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
    **keys: Any,
) -> xr.DataTree:
    """A bias scan from Python.

    Args:
        aligned: the model that donates its activations.
        base: the model that receives them; None takes the aligned one (then ``ablate`` names what differs).
        pairs: a file, `BiasPair` values, or a mapping as in the recipe; None takes nsp's own.
        out: where to keep the run as a store; None keeps it in memory alone.
        keys: the recipe's other keys (``ablate``, ``components``, ``patch``, ``layers``, ``neurons``, ...).
    """
    options: Any = {} if pairs is None else {"path": str(pairs)} if isinstance(pairs, str | Path) else pairs
    given = None
    if not isinstance(options, Mapping | BiasPairsOptions):
        given, options = BiasPairs(tuple(options)), {}
    receiver = aligned if base is None else base
    models = {"aligned": aligned.name, **({} if base is None else {"base": base.name})}
    recipe = checked(BiasScanRecipe, {"kind": KIND, "models": models, "pairs": options, **keys})
    return runner.results(BiasScanJob(aligned, receiver, recipe, given), out=out, force=force, progress=progress)


register(Experiment(KIND, BiasScanRecipe, prepare, summarise, headline, csv_tables, panels=panels))
