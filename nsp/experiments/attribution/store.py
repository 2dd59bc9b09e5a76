"""The store of an attribution run: its groups with all labels, before anything has run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.engine.edges import receiver_names, sender_names
from nsp.experiments.attribution.items import Item, chosen_text
from nsp.experiments.attribution.parts import Attributed
from nsp.experiments.attribution.recipe import AttributionRecipe, VerifyOptions
from nsp.experiments.attribution.verification import MEASURES
from nsp.experiments.labels import index_coord, prompts_dataset, text_array
from nsp.metrics import METRICS
from nsp.model import Model
from nsp.results import axis_coords

_SCORE = {
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


class Template:
    """The labels of one run.

    Attributes:
        kind: the metric's name; ``items`` the prompts; ``parts`` the attributed components; ``verified`` the one that is proved.
    """

    def __init__(
        self,
        model: Model,
        recipe: AttributionRecipe,
        items: Sequence[Item],
        left_out: Sequence[tuple[str, str]],
        kind: str,
        parts: Sequence[Attributed],
        verified: Attributed | None,
    ) -> None:
        self.model, self.recipe, self.items, self.left_out = model, recipe, items, left_out
        self.kind, self.parts, self.verified = kind, parts, verified

    @property
    def _verify(self) -> VerifyOptions:
        assert self.recipe.verify is not None
        return self.recipe.verify

    def tree(self) -> xr.DataTree:
        """All groups and labels; results blank, inputs filled."""
        tree: dict[str, xr.Dataset] = {"inputs": self._inputs(), "baseline": self._baseline()}
        prompts = [item.prompt for item in self.items]
        for part in self.parts if self.recipe.nodes else ():
            coords: Any = axis_coords(part.resolved, part.axes, prompts, "prompt", part.site.spec.dim)
            coords["prompt"] = self._prompt_coord()
            sizes = dict(zip(("layer", "position", "unit"), part.shape, strict=True))
            shape = (len(self.items), *(sizes[axis] for axis in ("layer", "position", "unit") if axis in part.axes))
            tree[f"attribution/{part.name}"] = self._scores_dataset(part, shape, coords)
            if part.has_units:
                tree[f"circuit/{part.name}"] = self._masks_dataset(part, shape, coords)
            if part is self.verified and self._verify.exact != "none":
                tree[f"effects/{part.name}"] = self._effects_dataset(part, shape, coords)
        if "edge" in self.recipe.methods:
            tree["attribution/edges"] = self._edges_dataset()
        if self.verified is not None:
            tree |= self._verification_datasets()
        return xr.DataTree.from_dict(tree)

    def _prompt_coord(self) -> xr.Variable:
        return index_coord("prompt", len(self.items), "prompt, from 0")

    def _scores_dataset(self, part: Attributed, shape: tuple[int, ...], coords: Any) -> xr.Dataset:
        variables = {
            method: (part.dims, np.full(shape, np.nan, dtype=np.float32), {
                "long_name": f"estimated change of {self.kind} when the unit is replaced by its donor",
                "units": METRICS[self.kind].units, "method": f"{method}: {self._method_text(method)}"})
            for method in self.recipe.nodes
        }  # fmt: skip
        return xr.Dataset(variables, coords, {"site": str(part.each), "donor": self.recipe.donor})

    def _method_text(self, method: str) -> str:
        steps = f", {self.recipe.steps} steps" if method.endswith("_ig") else ""
        attention = f", attention {self.recipe.attention}" if method == "relp" else ""
        donor = "" if method == "grad_x_act" else f"; donor {self.recipe.donor}"
        return _SCORE[method] + steps + attention + donor

    def _masks_dataset(self, part: Attributed, shape: tuple[int, ...], coords: Any) -> xr.Dataset:
        variables = {
            method: (part.dims, np.full(shape, -1, dtype=np.int8), {
                "long_name": f"1 where the unit is in the circuit by {method} (-1: not computed)", "units": "1",
                "method": f"selected by {method}"})
            for method in self.recipe.nodes
        }  # fmt: skip
        return xr.Dataset(variables, coords, {"selection": self.recipe.select.model_dump(mode="json")})

    def _effects_dataset(self, part: Attributed, shape: tuple[int, ...], coords: Any) -> xr.Dataset:
        kind = METRICS[self.kind]
        how = f"one exact counterfactual a unit, donor {self.recipe.donor}"
        variables = {
            self.kind: (part.dims, np.full(shape, np.nan, dtype=np.float32), {
                "long_name": kind.long_name, "units": kind.units, "method": how}),
            "change": (part.dims, np.full(shape, np.nan, dtype=np.float32), {
                "long_name": f"{self.kind} with the unit replaced by its donor, minus the base run's", "units": kind.units,
                "method": how}),
        }  # fmt: skip
        return xr.Dataset(variables, coords, {"site": str(part.each), "donor": self.recipe.donor})

    def _edges_dataset(self) -> xr.Dataset:
        runtime = self.model.runtime
        senders, receivers = sender_names(runtime), receiver_names(runtime)
        shape = (len(self.items), len(senders), len(receivers))
        attrs = {
            "long_name": f"estimated change of {self.kind} when the edge carries the donor (NaN: no such edge)",
            "units": METRICS[self.kind].units,
            "method": f"EAP: (donor - base) of the sender x gradient at the receiver's input, over all positions; donor {self.recipe.donor}",
        }
        coords = {
            "prompt": self._prompt_coord(),
            "sender": xr.Variable(("sender",), text_array(senders), {"long_name": "what sends"}),
            "receiver": xr.Variable(("receiver",), text_array(receivers), {"long_name": "what receives"}),
        }
        blank = np.full(shape, np.nan, dtype=np.float32)
        return xr.Dataset({"edge": (("prompt", "sender", "receiver"), blank, attrs)}, coords)

    def _verification_datasets(self) -> dict[str, xr.Dataset]:
        assert self.verified is not None
        verify, count = self._verify, len(self.items)
        units = METRICS[self.kind].units
        proportions = np.asarray(verify.sizes, dtype=np.float64)
        made: dict[str, xr.Dataset] = {}
        step = index_coord("step", len(verify.sizes), "circuit size, ascending")
        sizes = {
            "proportion": (
                ("step",),
                proportions,
                {"long_name": "proportion of all units", "units": "1", "method": "given"},
            ),
        }
        for number, kind in enumerate(self._verify.ablations):
            variables: dict[str, Any] = {}
            for method in self.recipe.nodes:
                for measure in MEASURES:
                    variables[f"{measure}_{method}"] = (("prompt", "step"), np.full((count, len(proportions)), np.nan, dtype=np.float32), {
                        "long_name": _CURVES[measure].format(metric=self.kind), "units": units,
                        "method": f"units ranked by absolute {method}; {kind} ablation of what is not kept"})  # fmt: skip
            for name, text in (("empty", "with every unit ablated"), ("whole", "in the ordinary run")):
                variables[name] = (("prompt",), np.full(count, np.nan, dtype=np.float32), {
                    "long_name": f"{self.kind} {text}", "units": units, "method": f"{kind} ablation"})  # fmt: skip
            coords: dict[str, Any] = {"prompt": self._prompt_coord(), "step": step, **sizes}
            if number == 0 and verify.curve_draws:
                variables["random"] = (
                    ("prompt", "step", "direction"), np.full((count, len(proportions), verify.curve_draws), np.nan, dtype=np.float32),
                    {"long_name": f"{self.kind} with only a random circuit kept, as many units in each layer as {self.recipe.select.method}'s",
                     "units": units, "method": f"{kind} ablation, seed {self.recipe.seed}"})  # fmt: skip
                coords["direction"] = index_coord("direction", verify.curve_draws, "random draw")
            made[f"circuit/curves-{kind}"] = xr.Dataset(
                variables, coords, {"universe": int(np.prod(self.verified.shape))}
            )
        if verify.draws:
            made["circuit/knockout"] = self._knockout_dataset()
        return made

    def _knockout_dataset(self) -> xr.Dataset:
        count, draws = len(self.items), self._verify.draws
        units, how = METRICS[self.kind].units, f"circuit by {self.recipe.select.method}, scaled to 0"
        variables = {
            "circuit": (("prompt",), np.full(count, np.nan, dtype=np.float32), {
                "long_name": f"{self.kind} with the selected circuit scaled to 0", "units": units, "method": how}),
            "random": (("prompt", "direction"), np.full((count, draws), np.nan, dtype=np.float32), {
                "long_name": f"{self.kind} with a random circuit scaled to 0, as many units in each layer", "units": units,
                "method": f"random units, seed {self.recipe.seed}, scaled to 0"}),
            "size": (("prompt",), np.full(count, -1, dtype=np.int32), {
                "long_name": "units of the circuit", "units": "1", "method": how}),
        }  # fmt: skip
        coords = {"prompt": self._prompt_coord(), "direction": index_coord("direction", draws, "random draw")}
        return xr.Dataset(variables, coords)

    def _baseline(self) -> xr.Dataset:
        attrs = {
            "long_name": METRICS[self.kind].long_name,
            "units": METRICS[self.kind].units,
            "method": "ordinary forward pass",
        }
        values = np.full(len(self.items), np.nan, dtype=np.float32)
        return xr.Dataset({self.kind: (("prompt",), values, attrs)}, {"prompt": self._prompt_coord()})

    def _inputs(self) -> xr.Dataset:
        dataset = prompts_dataset([item.prompt for item in self.items], names=[item.name for item in self.items])
        given = {"units": "1", "method": "given, or the model's own prediction where none was"}
        added: dict[str, Any] = {}
        for number, name in enumerate(("target", "counterfactual")):
            ids = np.array(
                [item.tokens[number] if len(item.tokens) > number else -1 for item in self.items], dtype=np.int64
            )
            texts = text_array([chosen_text(self.model, item, number) for item in self.items])
            added[f"{name}_id"] = (("prompt",), ids, {"long_name": f"token id of the {name} (-1: none)", **given})
            added[name] = (("prompt",), texts, {"long_name": f"{name} token", **given})
        ranks = np.array([item.rank for item in self.items], dtype=np.int64)
        at = np.array([item.position for item in self.items], dtype=np.int64)
        how = {"units": "1", "method": "ordinary forward pass"}
        added["target_rank"] = (("prompt",), ranks, {"long_name": "rank of the target (0: most likely)", **how})
        added["measured_at"] = (("prompt",), at, {"long_name": "position that is measured", **given})
        if any(item.donor is not None for item in self.items):
            texts = text_array([(item.donor.text or "") if item.donor else "" for item in self.items])
            added["donor_text"] = (("prompt",), texts, {"long_name": "counterfactual prompt", **given})
        attrs: dict[str, Any] = {}
        if self.left_out:
            attrs = {
                "left_out": len(self.left_out),
                "left_out_items": [f"{name}: {why}" for name, why in self.left_out],
            }
        return dataset.assign(added).assign_attrs(attrs)
