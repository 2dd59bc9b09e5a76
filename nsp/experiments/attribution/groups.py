"""What an attribution run will know, labelled: names, dims, units and meaning of everything that it fills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.engine.edges import receiver_names, sender_names
from nsp.experiments.attribution.component import AttributedComponent
from nsp.experiments.attribution.recipe import AttributionRecipe, VerifyOptions
from nsp.experiments.attribution.targets import Target
from nsp.experiments.attribution.verification import MEASURES
from nsp.experiments.labels import Group, Variable, given_variable, index_coord, prompts_dataset, text_array, text_coord
from nsp.metrics import METRICS
from nsp.model import Model

_SCORES = {
    "atp": "gradient x (donor - base)",
    "atp_ig": "gradient averaged from base to donor at the site x (donor - base)",
    "eap_ig": "gradient averaged over embeddings from base to donor x (donor - base)",
    "grad_x_act": "gradient x (0 - activation)",
    "relp": "gradient with LRP rules x (donor - base)",
}
_CURVES = {
    "faithfulness": "{metric} with only the circuit kept",
    "completeness": "{metric} with the circuit ablated and all else kept",
    "minimality": "{metric} with only the circuit kept, without its weakest tenth",
}
_PROMPT = ("prompt",)


class AttributionGroups:
    """The groups of one run; ``metric`` is the name of what is attributed."""

    def __init__(
        self,
        model: Model,
        recipe: AttributionRecipe,
        targets: Sequence[Target],
        left_out: Sequence[tuple[str, str]],
        metric: str,
    ) -> None:
        self.model, self.recipe, self.targets, self.left_out = model, recipe, targets, left_out
        self.metric, self.units = metric, METRICS[metric].units
        self.prompt = index_coord("prompt", len(targets), "prompt, from 0")

    def groups(
        self, components: Sequence[AttributedComponent], verified: AttributedComponent | None
    ) -> dict[str, Group | xr.Dataset]:
        """All groups; ``verified`` is the component whose circuits are proved."""
        verify = self.recipe.verify
        groups: dict[str, Group | xr.Dataset] = {"inputs": self._inputs(), "baseline": self._baseline()}
        for component in components if self.recipe.nodes else ():
            groups[f"attribution/{component.name}"] = self._scores(component)
            if component.has_units:
                groups[f"circuit/{component.name}"] = self._circuits(component)
            if component is verified and verify is not None and verify.exact != "none":
                groups[f"effects/{component.name}"] = self._effects(component)
        if "edge" in self.recipe.methods:
            groups["attribution/edges"] = self._edges()
        if verified is not None and verify is not None:
            for ablation in verify.ablations:
                drawn = verify.curve_draws if ablation == verify.ablations[0] else 0
                groups[f"circuit/curves-{ablation}"] = self._curves(ablation, verify, drawn, verified.units)
            if verify.draws:
                groups["circuit/knockout"] = self._knockout(verify.draws)
        return groups

    def _inputs(self) -> xr.Dataset:
        targets = self.targets
        given, ordinary = "given, or the model's own prediction where none was", "ordinary forward pass"

        def of_prompts(values: Any, meaning: str, method: str = given) -> xr.Variable:
            return given_variable(_PROMPT, values, meaning, method)

        added: dict[str, xr.Variable] = {}
        for number, name in enumerate(("target", "counterfactual")):
            ids = [target.tokens[number] if len(target.tokens) > number else -1 for target in targets]
            added[f"{name}_id"] = of_prompts(ids, f"token id of the {name} (-1: none)")
            added[name] = of_prompts(text_array([target.text(self.model, number) for target in targets]), f"{name} token")
        ranks = [target.rank for target in targets]
        added["target_rank"] = of_prompts(ranks, "rank of the target (0: most likely)", ordinary)
        added["measured_at"] = of_prompts([target.position for target in targets], "position that is measured")
        if any(target.donor is not None for target in targets):
            donors = text_array([(target.donor.text or "") if target.donor else "" for target in targets])
            added["donor_text"] = of_prompts(donors, "counterfactual prompt")
        inputs = prompts_dataset([target.prompt for target in targets], names=[target.name for target in targets])
        attrs: dict[str, Any] = {}
        if self.left_out:
            attrs["left_out"] = len(self.left_out)
            attrs["left_out_items"] = [f"{name}: {why}" for name, why in self.left_out]
        return inputs.assign(added).assign_attrs(attrs)

    def _baseline(self) -> Group:
        meaning = METRICS[self.metric].long_name
        return Group(
            {self.metric: Variable(_PROMPT, meaning, self.units, "ordinary forward pass")}, {"prompt": self.prompt}
        )

    def _coords(self, component: AttributedComponent) -> dict[str, Any]:
        return {**component.coords([target.prompt for target in self.targets]), "prompt": self.prompt}

    def _scores(self, component: AttributedComponent) -> Group:
        recipe = self.recipe
        meaning = f"estimated change of {self.metric} when the unit is replaced by its donor"
        variables: dict[str, Variable] = {}
        for method in recipe.nodes:
            steps = f", {recipe.steps} steps" if method.endswith("_ig") else ""
            attention = f", attention {recipe.attention}" if method == "relp" else ""
            donor = "" if method == "grad_x_act" else f"; donor {recipe.donor}"
            how = f"{method}: {_SCORES[method]}{steps}{attention}{donor}"
            variables[method] = Variable(component.dims, meaning, self.units, how)
        return Group(variables, self._coords(component), {"site": str(component.each), "donor": recipe.donor})

    def _circuits(self, component: AttributedComponent) -> Group:
        variables = {
            method: Variable(
                component.dims, f"1 where the unit is in the circuit by {method} (-1: not computed)", "1",
                f"selected by {method}", np.int8,
            )
            for method in self.recipe.nodes
        }  # fmt: skip
        return Group(variables, self._coords(component), {"selection": self.recipe.select.model_dump(mode="json")})

    def _effects(self, component: AttributedComponent) -> Group:
        how = f"one exact counterfactual a unit, donor {self.recipe.donor}"
        change = f"{self.metric} with the unit replaced by its donor, minus the base run's"
        variables = {
            self.metric: Variable(component.dims, METRICS[self.metric].long_name, self.units, how),
            "change": Variable(component.dims, change, self.units, how),
        }
        return Group(variables, self._coords(component), {"site": str(component.each), "donor": self.recipe.donor})

    def _edges(self) -> Group:
        edge = Variable(
            ("prompt", "sender", "receiver"),
            f"estimated change of {self.metric} when the edge carries the donor (NaN: no such edge)",
            self.units,
            f"EAP: (donor - base) of the sender x gradient at the receiver's input, over all positions; donor {self.recipe.donor}",
        )
        coords = {
            "prompt": self.prompt,
            "sender": text_coord("sender", sender_names(self.model.runtime), "what sends"),
            "receiver": text_coord("receiver", receiver_names(self.model.runtime), "what receives"),
        }
        return Group({"edge": edge}, coords)

    def _curves(self, ablation: str, verify: VerifyOptions, drawn: int, universe: int) -> Group:
        """The metric by circuit size under one ablation; ``drawn`` random circuits of each size beside it."""
        dims, how = ("prompt", "step"), f"{ablation} ablation"
        variables: dict[str, Variable] = {}
        for method in self.recipe.nodes:
            ranked = f"units ranked by absolute {method}; {how} of what is not kept"
            for measure in MEASURES:
                meaning = _CURVES[measure].format(metric=self.metric)
                variables[f"{measure}_{method}"] = Variable(dims, meaning, self.units, ranked)
        variables["empty"] = Variable(_PROMPT, f"{self.metric} with every unit ablated", self.units, how)
        variables["whole"] = Variable(_PROMPT, f"{self.metric} in the ordinary run", self.units, how)
        proportion = given_variable(("step",), np.asarray(verify.sizes), "proportion of all units", "given")
        coords = {
            "prompt": self.prompt,
            "step": index_coord("step", len(verify.sizes), "circuit size, ascending"),
            "proportion": proportion,
        }
        if drawn:
            like = f"as many units in each layer as {self.recipe.select.method}'s"
            meaning = f"{self.metric} with only a random circuit kept, {like}"
            seeded = f"{how}, seed {self.recipe.seed}"
            variables["random"] = Variable((*dims, "direction"), meaning, self.units, seeded)
            coords["direction"] = index_coord("direction", drawn, "random draw")
        return Group(variables, coords, {"universe": universe})

    def _knockout(self, draws: int) -> Group:
        how = f"circuit by {self.recipe.select.method}, scaled to 0"
        selected = f"{self.metric} with the selected circuit scaled to 0"
        drawn = f"{self.metric} with a random circuit scaled to 0, as many units in each layer"
        seeded = f"random units, seed {self.recipe.seed}, scaled to 0"
        variables = {
            "circuit": Variable(_PROMPT, selected, self.units, how),
            "random": Variable(("prompt", "direction"), drawn, self.units, seeded),
            "size": Variable(_PROMPT, "units of the circuit", "1", how, np.int32),
        }
        return Group(variables, {"prompt": self.prompt, "direction": index_coord("direction", draws, "random draw")})
