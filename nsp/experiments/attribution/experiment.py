"""Attribution: which neurons, heads or edges carry an answer, from gradients; and the proof of it by exact patching.

The model: a prompt with an answer. Gradients estimate what the metric (the target's logit minus the counterfactual
token's) would change if each unit were replaced by its donor (`nsp.experiments.attribution.scores`); a selection of the
strongest is a circuit (`nsp.experiments.attribution.selection`, `nsp.experiments.circuits`). Exact patching says how far
the estimates are right, and runs with everything outside (or inside) a circuit ablated say whether it does what it
claims (`nsp.experiments.attribution.verification`).

Sign: a score estimates metric(unit replaced by its donor) - metric(base), the change that exact patching measures.

Cost: for each prompt a forward and a backward pass for each method (``steps`` of them for the integrated ones); of the
proof one counterfactual for each unit whose exact effect is asked for, and one for each size of each curve.

Limits: scores are first-order estimates. They rank single units well, and say nothing of units that stand in for each
other, which is what the curves are for. Only units at ``positions`` are ablated; everything elsewhere stays.
Nanda 2023; Syed et al. 2023; Hanna et al. 2024; Marks et al. 2024; Jafari et al. 2025; Mueller et al. 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr

from nsp.datasets.prompts import Prompt
from nsp.engine.donors import Donor
from nsp.engine.edges import check_edges
from nsp.engine.estimates import Estimate
from nsp.engine.gradients import Objective
from nsp.engine.masked_ablation import MaskedRuns
from nsp.engine.propagation_rules import Rules, check_rules
from nsp.engine.request import Request
from nsp.engine.selfcheck import ensure_checked
from nsp.errors import InputError
from nsp.experiments.attribution.component import AttributedComponent, attributed_component
from nsp.experiments.attribution.groups import AttributionGroups
from nsp.experiments.attribution.recipe import OWN, AttributionRecipe, VerifyOptions
from nsp.experiments.attribution.scores import Scored, edge_scores, node_scores
from nsp.experiments.attribution.selection import Mask, Scores, ranking, select_mask
from nsp.experiments.attribution.targets import attribution_targets, metric_kind
from nsp.experiments.attribution.verification import curve_masks, random_like, sizes_of
from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group
from nsp.experiments.prompt_options import encode_prompts
from nsp.metrics import Metric


class Attribution(Experiment[AttributionRecipe]):
    """Three stages, each prompt by prompt: the scores; exact effects; circuits with their curves and knock-outs."""

    results = (
        "``attribution/<component>``: the scores, one variable for each method, dims (prompt, layer, position) and neuron or "
        "head; ``attribution/edges``: ``edge``, (prompt, sender, receiver); ``circuit/<component>``: 1 where a unit is in the "
        "circuit, dims as the scores; ``circuit/curves-<ablation>``: the metric by circuit size, (prompt, step), and "
        "``circuit/knockout``, (prompt,); ``effects/<component>``: exact effects, dims as the scores; ``baseline``: the metric "
        "in the ordinary run, (prompt,); ``inputs``: prompts, targets and counterfactual tokens"
    )

    def prepare(self) -> None:
        model, recipe = self.model, self.recipe
        ensure_checked(model.runtime)
        if "relp" in recipe.methods:
            check_rules(model.runtime)
        if "edge" in recipe.methods:
            check_edges(model.runtime)
        chosen = attribution_targets(model, recipe)
        self.targets, self.left_out, self.every = chosen.targets, chosen.left_out, chosen.every
        self.prompts = [target.prompt for target in self.targets]
        self.metric = metric_kind(recipe, self.targets)
        self.components = [attributed_component(model, recipe, name, self.prompts) for name in recipe.components]
        self.with_units = [component for component in self.components if component.has_units]
        self.verified = self.with_units[0] if recipe.verify is not None and self.with_units else None
        if recipe.verify is not None:
            self._check_verification()
        self.donor = self._donor(recipe.donor)
        self.ablations = {kind: self._donor(kind) for kind in (recipe.verify.ablations if recipe.verify else ())}

    def _check_verification(self) -> None:
        if self.verified is None:
            raise InputError("verify needs a component with heads or neurons, such as mlp_neurons or z")
        if self.recipe.select.over != "prompt" and len(set(map(len, self.verified.resolved.positions))) > 1:
            raise InputError(
                f"over: {self.recipe.select.over} needs as many positions in every prompt; take positions: last"
            )

    @property
    def verify(self) -> VerifyOptions:
        assert self.recipe.verify is not None
        return self.recipe.verify

    def _donor(self, kind: Any) -> Donor:
        if kind == "counterfactual":
            return Donor(kind, prompts=tuple(target.donor_prompt for target in self.targets))
        if kind == "zero":
            return Donor(kind)
        return Donor(kind, self.reference, self.recipe.seed, over=self.recipe.over)

    @cached_property
    def reference(self) -> tuple[Prompt, ...] | None:
        """The reference prompts of mean and resample, or None for nsp's own."""
        given = self.recipe.reference
        if given == OWN:
            return self.every
        return None if given is None else encode_prompts(self.model, given, self.recipe.chat)

    def statement(self) -> dict[str, Any]:
        recipe = self.recipe
        prompts = [
            {
                "ids": list(target.prompt.token_ids),
                "tokens": list(target.tokens),
                "position": target.position,
                "donor": None if target.donor is None else list(target.donor.token_ids),
            }
            for target in self.targets
        ]
        sites = [
            {
                "component": component.name,
                "layers": list(component.resolved.layers),
                "positions": [list(positions) for positions in component.resolved.positions],
            }
            for component in self.components
        ]
        return {
            "prompts": prompts,
            "metric": self.metric,
            "sites": sites,
            "methods": list(recipe.methods),
            "steps": recipe.steps,
            "attention": recipe.attention,
            "donor": recipe.donor,
            "reference": None if self.reference is None else [list(prompt.token_ids) for prompt in self.reference],
            "over": recipe.over,
            "seed": recipe.seed,
            "select": {**recipe.select.model_dump(mode="json"), "blacklist": sorted(recipe.select.barred())},
            "verify": None if recipe.verify is None else recipe.verify.model_dump(mode="json"),
        }

    def estimates(self) -> Iterator[Estimate]:
        if self.verified is not None and self.verify.exact == "all":
            for row, target in enumerate(self.targets):
                request = self.engine.plan(self._request(self.verified, row))
                yield self.engine.estimate(request, f"{self.verified.each}, {target.name}")

    def groups(self) -> Mapping[str, Group | xr.Dataset]:
        return AttributionGroups(self.model, self.recipe, self.targets, self.left_out, self.metric).groups(
            self.components, self.verified
        )

    # --- running ----------------------------------------------------------------------------------------------------

    def stages(self) -> Sequence[Stage]:
        scores = [f"attribution/{component.name}" for component in self.components if self.recipe.nodes]
        edges = ["attribution/edges"] if "edge" in self.recipe.methods else []
        stages = [self._stage(self._score, "baseline", *scores, *edges)]
        if self.verified is not None and self.verify.exact != "none":
            read = ["baseline", f"attribution/{self.verified.name}"] if self.verify.exact == "top" else []
            stages.append(self._stage(self._patch, f"effects/{self.verified.name}", needs=read))
        if self.recipe.nodes and self.with_units:
            circuits = [f"circuit/{component.name}" for component in self.with_units]
            if self.verified is not None:
                circuits += [f"circuit/curves-{kind}" for kind in self.ablations]
                circuits += ["circuit/knockout"] if self.verify.draws else []
            read = ["baseline", *(f"attribution/{component.name}" for component in self.with_units)]
            stages.append(self._stage(self._select, *circuits, needs=read))
        return stages

    def _stage(self, run: Callable[[int, Region, Stored], Values], *groups: str, needs: Sequence[str] = ()) -> Stage:
        """A stage with one unit of work for each prompt; ``run`` takes the prompt's number first."""
        return Stage(
            lambda region, stored: run(region.indices("prompt")[0], region, stored), groups, {"prompt": 1}, tuple(needs)
        )

    def _score(self, row: int, region: Region, stored: Stored) -> Values:
        """One prompt's scores by every method, and its metric."""
        target = self.targets[row]
        objective = Objective(self.metric, torch.tensor([target.tokens]), (target.position,))
        rules = Rules(self.recipe.attention)
        scored = Scored(target.prompt, objective, self.donor.rows([row]), self.recipe.steps, rules)
        values: dict[str, dict[str, Any]] = {"baseline": {self.metric: [self._masked_runs(row).base]}}
        for component in self.components if self.recipe.nodes else ():
            values[f"attribution/{component.name}"] = {
                method: component.labelled(node_scores(self.engine, scored, component.site, method))
                for method in self.recipe.nodes
            }
        if "edge" in self.recipe.methods:
            values["attribution/edges"] = {"edge": edge_scores(self.engine, scored)[None]}
        return values

    def _patch(self, row: int, region: Region, stored: Stored) -> Values:
        """The metric with single units of one prompt replaced: all of them, or each method's strongest."""
        component = self.verified
        assert component is not None
        if self.verify.exact == "all":
            measured = self.engine.measure(self.engine.plan(self._request(component, row)), progress=region.progress)
            exact, base = measured.values[0][0], float(measured.base[0][0])
        else:
            base = float(stored["baseline"][self.metric].values[row])
            exact = self._strongest(component, row, stored)
        return {
            f"effects/{component.name}": {
                self.metric: component.labelled(exact),
                "change": component.labelled(exact.astype(np.float64) - base),
            }
        }

    def _strongest(self, component: AttributedComponent, row: int, stored: Stored) -> np.ndarray:
        """The metric with each of every method's strongest units replaced, NaN elsewhere, (layer, position, unit)."""
        scores = [self._scores(component, method, row, stored) for method in self.recipe.nodes]
        chosen = sorted({int(unit) for values in scores for unit in ranking(np.abs(values))[: self.verify.top]})
        kept = np.ones((len(chosen), scores[0].size), dtype=bool)
        kept[np.arange(len(chosen)), chosen] = False
        exact = np.full(scores[0].size, np.nan, dtype=np.float32)
        exact[chosen] = self._masked_runs(row).run(
            component.site, self.donor.rows([row]), kept.reshape(-1, *scores[0].shape)
        )
        return exact.reshape(scores[0].shape)

    def _select(self, row: int, region: Region, stored: Stored) -> Values:
        """One prompt's circuits by every method; of the verified component, what they do."""
        values: dict[str, dict[str, Any]] = {}
        for component in self.with_units:
            masks = {method: self._circuit(component, method, row, stored) for method in self.recipe.nodes}
            values[f"circuit/{component.name}"] = {method: mask[None] for method, mask in masks.items()}
            if component is self.verified:
                values |= self._verify(component, row, masks[self.recipe.select.method], stored)
        return values

    def _circuit(self, component: AttributedComponent, method: str, row: int, stored: Stored) -> Mask:
        """The selected units of one prompt by one method, (layer, position, unit) of the longest prompt."""
        select = self.recipe.select.model_copy(update={"method": method})
        alone = select.over == "prompt" and select.universal is None
        rows = [row] if alone else list(range(len(self.targets)))
        attributed = stored[f"attribution/{component.name}"].isel(prompt=rows)
        lengths = [len(self.prompts[prompt]) for prompt in rows]
        scores = Scores.stored(attributed, method, lengths, stored["baseline"].isel(prompt=rows))
        return np.asarray(select_mask(scores, select, self.model.geometry.n_layers)[rows.index(row)])

    def _verify(
        self, component: AttributedComponent, row: int, circuit: Mask, stored: Stored
    ) -> dict[str, dict[str, Any]]:
        """Curves over circuit size, and the circuit scaled to 0, beside random circuits."""
        verify, recipe, runs = self.verify, self.recipe, self._masked_runs(row)
        orders = {method: self._order(component, method, row, stored) for method in recipe.nodes}
        circuit = circuit[:, : len(component.resolved.positions[row])]
        shape = circuit.shape
        sizes = sizes_of(verify.sizes, circuit.size)
        seed = recipe.seed * 1_000_003 + row

        def measured(donor: Donor, masks: Mask) -> np.ndarray:
            """The metric with only the units of each mask kept, (1, then the masks' leading dims)."""
            return runs.run(component.site, donor, masks.reshape(-1, *shape)).reshape(1, *masks.shape[:-3])

        values: dict[str, dict[str, Any]] = {}
        for kind, donors in self.ablations.items():
            donor = donors.rows([row])
            curves: dict[str, Any] = {}
            for method, order in orders.items():
                masks = curve_masks(order, sizes, shape)
                by_measure = measured(donor, np.stack(list(masks.values())))[0]
                curves |= {f"{name}_{method}": curve[None] for name, curve in zip(masks, by_measure, strict=True)}
            curves["empty"] = measured(donor, np.zeros((1, *shape), dtype=bool))[0]
            curves["whole"] = [runs.base]
            if not values and verify.curve_draws:
                inside = curve_masks(orders[recipe.select.method], sizes, shape)["faithfulness"]
                drawn = [random_like(mask, verify.curve_draws, seed + size) for size, mask in enumerate(inside)]
                curves["random"] = measured(donor, np.stack(drawn))
            values[f"circuit/curves-{kind}"] = curves
        if verify.draws:
            scaled = measured(Donor("zero"), ~np.concatenate([circuit[None], random_like(circuit, verify.draws, seed)]))
            values["circuit/knockout"] = {
                "circuit": scaled[:, 0], "random": scaled[:, 1:], "size": [circuit.sum()],
            }  # fmt: skip
        return values

    def _scores(self, component: AttributedComponent, method: str, row: int, stored: Stored) -> np.ndarray:
        """One prompt's scores as they are stored, float32 (layer, position, unit)."""
        values = stored[f"attribution/{component.name}"][method].isel(prompt=row).values
        return np.asarray(values[:, : len(component.resolved.positions[row])], dtype=np.float32)

    def _order(self, component: AttributedComponent, method: str, row: int, stored: Stored) -> np.ndarray:
        """All units, strongest first: by the prompt's own scores, or by their mean over prompts where circuits are of many."""
        rows = [row] if self.recipe.select.over == "prompt" else range(len(self.targets))
        return ranking(np.abs(np.mean([self._scores(component, method, prompt, stored) for prompt in rows], axis=0)))

    def _metric(self, row: int) -> Metric:
        return Metric(self.metric, position=str(self.targets[row].position))

    def _masked_runs(self, row: int) -> MaskedRuns:
        tokens = torch.tensor([self.targets[row].tokens])
        return MaskedRuns(self.model.runtime, self.prompts[row], self._metric(row), tokens, self.budget)

    def _request(self, component: AttributedComponent, row: int) -> Request:
        """The replacement of every unit of one prompt, one by one."""
        prompt = self.prompts[row]
        intervention = self.donor.rows([row]).intervention(self.model.runtime, component.each, [prompt])
        tokens = torch.tensor([self.targets[row].tokens])
        return Request((prompt,), (intervention,), (self._metric(row),), (tokens,), axes=component.axes)
