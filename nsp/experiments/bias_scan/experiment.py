"""Bias scan: where do an aligned model and its base part ways on sentences that express a stereotype?

The model: for each sentence, activations of the aligned model's run are patched into the base model's run of the same
sentence, layer by layer, and KL(aligned || patched base) of the next-token distribution says how much of their
divergence is left. The layer that removes most is the prompt's *star layer* (`nsp.experiments.bias_scan.layer_profile`);
in it every single neuron is patched, exactly, and the neurons that remove most over all prompts are *found*. Then the
found neurons are ablated in the base model, and the scan reports what that does to the divergence, to the preference
for the stereotyping sentence of each pair (the CrowS-Pairs score), and to unrelated text (perplexity of neutral
sentences): a neuron that merely breaks the model shows there.

Cost: see `nsp.engine.two_models`; a prompt of 15 tokens takes 60 counterfactuals for two components of 30 layers, and one
per neuron.

Limits: a divergence between two models is not bias; the star layer says where alignment training changed what the base
computes on these sentences, and nothing about why. CrowS-Pairs is noisy (Blodgett et al. 2021). Nangia et al. 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from nsp.datasets.reference import NEUTRAL_SENTENCES
from nsp.engine.estimates import Estimate
from nsp.engine.fixed_interventions import FixedInterventions
from nsp.engine.plan import model_statement
from nsp.engine.selfcheck import ensure_checked
from nsp.engine.two_models import TwoModels
from nsp.experiments.alignment_scan.activations import GROUP as ACTIVATIONS
from nsp.experiments.alignment_scan.activations import activation_group, activation_stage
from nsp.experiments.alignment_scan.prompts import AlignmentPrompts, alignment_prompts
from nsp.experiments.bias_scan.cost import scan_estimates
from nsp.experiments.bias_scan.found_neurons import found_neurons, neurons_by_layer
from nsp.experiments.bias_scan.groups import ABLATION, FOUND, NEURONS, NEUTRAL, NO_STAR_LAYER, NOT_DRAWN, scan_groups
from nsp.experiments.bias_scan.layer_profile import is_stepwise, layer_profile, removed_by_layer
from nsp.experiments.bias_scan.model_pair import check_comparable, fit_maps, scan_layers
from nsp.experiments.bias_scan.prompts import ScanPrompt, scan_inputs, scan_prompts, sentence_ids, sentence_logprobs
from nsp.experiments.bias_scan.recipe import BiasScanRecipe
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group
from nsp.interventions import ablate
from nsp.progress import BranchProgress

# Prompts in one unit of work: what is lost at most when a run is killed.
_BLOCK = 8
_ABLATION_BLOCK = 32


class BiasScan(Experiment[BiasScanRecipe]):
    """A scan of two models: both checked against each other, every sentence encoded and aligned.

    ``model`` is the base, which receives activations; the aligned one is loaded unless it is given.
    """

    model_keys = ("aligned", "base")
    model_texts: ClassVar = {
        "aligned": " that donates its activations",
        "base": " that receives them; None takes the aligned one, with what ``ablate`` names ablated",
    }
    positional = ("pairs",)
    results = (
        "``baseline`` (prompt), ``effects/<component>`` and ``receipts/<component>`` (prompt, layer), ``effects/mlp_neurons`` "
        "(prompt, neuron), ``circuit/found`` (neuron: rank), ``effects/ablation`` (prompt), ``effects/neutral`` (prompt: neutral "
        "sentence), ``activations/mlp_neurons`` (prompt, layer, neuron) where there is an alignment scan, and ``inputs``"
    )

    def prepare(self) -> None:
        recipe, base = self.recipe, self.model
        loaded = recipe.aligned == recipe.model and "aligned" not in self.given
        self.aligned = base if loaded else self.second_model("aligned", recipe.aligned)
        read = recipe.pairs.read()
        self.pairs, self.bad_rows = recipe.pairs.select(read, recipe.seed), read.bad
        check_comparable(
            self.aligned, base, recipe.components, mapped=recipe.map is not None, neurons=recipe.neurons is not None
        )
        self.prompts = scan_prompts(self.aligned, base, self.pairs)
        self.layers = scan_layers(base, recipe)
        ensure_checked(base.runtime)
        self.interventions = tuple(ablate(site, recipe.ablation) for site in recipe.ablate)
        self.fixed = self._fixed()
        self.alignment: AlignmentPrompts | None = None
        if recipe.alignment is not None:
            self.alignment = alignment_prompts(self.aligned, recipe.alignment, self.pairs, recipe.seed)

    def _fixed(self, neurons: Mapping[int, Sequence[int]] | None = None) -> FixedInterventions:
        """What is ablated in the base model throughout: what the recipe says, and some neurons of layers."""
        added = []
        if neurons is not None and self.recipe.neurons is not None:
            sites = [f"mlp_neurons[{layer}][{','.join(map(str, units))}] @ *" for layer, units in neurons.items()]
            added = [ablate(site, self.recipe.neurons.ablation) for site in sites]
        prompts = [item.paired.base for item in self.prompts]
        return FixedInterventions.of(self.model.runtime, (*self.interventions, *added), prompts)

    @property
    def cells(self) -> tuple[int, ...]:
        """The labels of the dim ``layer``; layers patched together have the last one's."""
        return self.layers[-1:] if self.recipe.patch == "together" else self.layers

    @cached_property
    def drawn(self) -> frozenset[int]:
        """The pairs whose prompts have their neurons patched."""
        most, count = None if self.recipe.neurons is None else self.recipe.neurons.prompts, len(self.pairs)
        if most is None or most // 2 >= count:
            return frozenset(range(count))
        return frozenset(np.random.default_rng(self.recipe.seed).permutation(count)[: most // 2].tolist())

    @cached_property
    def maps(self) -> Mapping[str, Any] | None:
        """Maps between models of other widths, fitted when first needed."""
        return None if self.recipe.map is None else fit_maps(self.aligned, self.model, self.recipe.components)

    # --- description ------------------------------------------------------------------------------------------------

    def statement(self) -> dict[str, Any]:
        left_out = {"out", "name", "description", "memory", "model", "models", "pairs"}
        statement = {
            "aligned": model_statement(self.aligned.provenance),
            "recipe": self.recipe.model_dump(mode="json", exclude=left_out),
            "prompts": [
                [list(item.paired.base.token_ids), list(item.base.scored), item.number, item.side] for item in self.prompts
            ],
        }
        return statement if self.alignment is None else statement | {"alignment": self.alignment.statement()}

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        base, prompts = self.model, len(self.prompts)
        groups: dict[str, Group | xr.Dataset] = {"inputs": scan_inputs(self.prompts, self.bad_rows)}
        groups |= scan_groups(
            self.recipe, prompts, self.cells, neurons=base.geometry.d_mlp, refusal=base.runtime.branch_refusal, maps=self.maps
        )
        if self.alignment is not None:
            groups[ACTIVATIONS] = activation_group(self.aligned, self.alignment)
        return groups

    def stages(self) -> Sequence[Stage]:
        scanned = [f"{top}/{component}" for component in self.recipe.components for top in ("effects", "receipts")]
        neurons = [] if self.recipe.neurons is None else [NEURONS]
        stages = [Stage(self._scan, ("baseline", *scanned, *neurons), {"prompt": _BLOCK})]
        if self.alignment is not None:
            stages.append(activation_stage(self.aligned, self.alignment))
        if neurons:
            stages.append(Stage(self._find, (FOUND, NEUTRAL), needs=(NEURONS,)))
            stages.append(Stage(self._ablate, (ABLATION,), {"prompt": _ABLATION_BLOCK}, needs=(FOUND,)))
        return stages

    def estimates(self) -> Iterable[Estimate]:
        return scan_estimates(self.model, self.recipe, self.prompts, self.cells)

    # --- stages -----------------------------------------------------------------------------------------------------

    def _scan(self, region: Region, stored: Stored) -> Values:
        """Patch layer by layer, and every neuron of one layer, on a block of prompts."""
        recipe = self.recipe
        items = [self.prompts[row] for row in region.indices("prompt")]
        runs = self._two_runs(items, recipe.components, everywhere=recipe.mean_over_positions)
        unpatched = runs.baseline()
        baseline = {"kl": unpatched.last[:, 0], "logprob_base": sentence_logprobs(self.model, [item.base for item in items], self.fixed)}
        if unpatched.mean is not None:
            baseline["kl_mean"] = unpatched.mean[:, 0]
        same = self.aligned is self.model and not self.interventions
        baseline["logprob_aligned"] = (
            baseline["logprob_base"] if same else sentence_logprobs(self.aligned, [item.aligned for item in items])
        )
        values: dict[str, dict[str, np.ndarray]] = {"baseline": baseline}
        stars: list[int | None] = []
        for component in recipe.components:
            patched = runs.scan(component, self.layers, recipe.patch, region.progress)
            effects = {"kl": patched.last, "delta_kl": patched.last.astype(np.float64) - unpatched.last}
            if patched.mean is not None and unpatched.mean is not None:
                effects |= {"kl_mean": patched.mean, "delta_kl_mean": patched.mean.astype(np.float64) - unpatched.mean}
            values[f"effects/{component}"] = effects
            values[f"receipts/{component}"] = {"fired": patched.fired, "change_norm": patched.change}
            if not stars:  # those of the first component count
                removed = removed_by_layer(baseline["kl"], patched.last, stepwise=is_stepwise(component, recipe.patch))
                profiles = zip(baseline["kl"], removed, strict=True)
                stars = [layer_profile(float(base), row, self.cells).layer for base, row in profiles]
        if recipe.neurons is not None:
            values[NEURONS] = self._neurons(runs, items, stars, unpatched.last, region.progress)
        return values

    def _neurons(
        self,
        runs: TwoModels,
        items: Sequence[ScanPrompt],
        stars: Sequence[int | None],
        unpatched: np.ndarray,
        progress: BranchProgress | None,
    ) -> dict[str, np.ndarray]:
        options = self.recipe.neurons
        assert options is not None
        chosen = stars if options.layer == "star" else [int(options.layer)] * len(items)
        drawn = [item.number in self.drawn for item in items]
        layers = [layer if flag else None for layer, flag in zip(chosen, drawn, strict=True)]
        patched = runs.neurons(layers, everywhere=options.positions == "all", progress=progress)
        labels = np.where(drawn, [NO_STAR_LAYER if layer is None else layer for layer in layers], NOT_DRAWN)
        return {"delta_kl": patched.last - unpatched, "neuron_layer": labels}

    def _find(self, region: Region, stored: Stored) -> Values:
        """Name the neurons that remove most, and score neutral text without them."""
        assert self.recipe.neurons is not None
        neurons = found_neurons(stored[NEURONS], 2 * len(self.drawn), self.recipe.neurons.top)
        sentences = [sentence_ids(self.model, text) for text in NEUTRAL_SENTENCES]
        neutral = {
            "logprob_base": sentence_logprobs(self.model, sentences, self.fixed),
            "logprob_ablated": sentence_logprobs(self.model, sentences, self._fixed(neurons_by_layer(neurons))),
            "n_scored": [len(sentence.scored) for sentence in sentences],
        }
        return {FOUND: neurons, NEUTRAL: neutral}

    def _ablate(self, region: Region, stored: Stored) -> Values:
        """Ablate what was found, on a block of prompts."""
        items = [self.prompts[row] for row in region.indices("prompt")]
        ablated = self._fixed(neurons_by_layer(stored[FOUND]))
        blocks = [items[low : low + _BLOCK] for low in range(0, len(items), _BLOCK)]
        kl = np.concatenate([self._two_runs(block).divergence_of(ablated) for block in blocks])
        return {ABLATION: {"kl": kl, "logprob": sentence_logprobs(self.model, [item.base for item in items], ablated)}}

    def _two_runs(self, items: Sequence[ScanPrompt], components: Sequence[str] = (), *, everywhere: bool = False) -> TwoModels:
        maps = None if self.maps is None else self.maps["maps"]
        return TwoModels(
            self.aligned.runtime, self.model.runtime, [item.paired for item in items], self.fixed, self.budget,
            components=components, everywhere=everywhere, maps=maps,
        )  # fmt: skip
