"""The groups of a direction's store, blank: names, dims, labels and units of everything that the run fills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsp.experiments.direction.prompts import Divided
from nsp.experiments.direction.recipe import DirectionRecipe
from nsp.experiments.direction.scores import SCORE, SCORE_ATTRS, Opening
from nsp.experiments.labels import index_coord, prompts_dataset, text_array
from nsp.model import Model

CONDITIONS = ("baseline", "ablated", "added")
_MEANS = "mean over the validation prompts of the {} set"


class DirectionGroups:
    """Makes the blank groups of one run."""

    def __init__(
        self, model: Model, recipe: DirectionRecipe, divided: Divided, layers: Sequence[int], openings: Sequence[Opening]
    ) -> None:
        self.model, self.recipe, self.divided = model, recipe, divided
        self.layers, self.openings = layers, openings
        self._test = divided.rows("test")
        self._ablate = "every write of the residual stream projected off the direction, at all positions; plain path"
        self._add = f"{recipe.coefficient:g} x the difference of means added to its layer's residual stream, at all positions"

    def inputs(self) -> xr.Dataset:
        """The prompts, with set and part, and the first tokens that the score counts."""
        divided = self.divided
        numbers = {name: iter(range(len(divided.prompts))) for name in set(divided.which)}
        found = prompts_dataset(divided.prompts, names=[f"{name} {next(numbers[name])}" for name in divided.which])
        how = {"units": "1", "method": "given"}
        seed = {"units": "1", "method": f"drawn with seed {self.recipe.seed}"}
        found = found.assign(
            set=(("prompt",), text_array(divided.which), {"long_name": "set that the prompt belongs to", **how}),
            part=(("prompt",), text_array(divided.part), {"long_name": "train, validation or test", **seed}),
        )
        found.attrs["behaviour"] = self.recipe.behaviour.name
        found.attrs["openings"] = [
            {"token_id": one.token_id, "token_text": one.text, "openings": list(one.openings)} for one in self.openings
        ]
        return found

    def _places(self) -> dict[str, Any]:
        count = self.divided.places
        texts = text_array(self.divided.place_texts)
        return {
            "layer": index_coord("layer", list(self.layers), "layer that receives the residual stream"),
            "position": index_coord("position", list(range(-count, 0)), "position, from the end of the prompt"),
            "token_text": xr.Variable(("position",), texts, {"long_name": "token (empty: prompts differ in it)"}),
        }

    def _blank(self, *extra: int) -> np.ndarray:
        return np.full((len(self.layers), self.divided.places, *extra), np.nan, dtype=np.float32)

    def candidates(self) -> xr.Dataset:
        """``direction`` (layer, position, neuron) and ``norm`` (layer, position)."""
        method = "mean over the positive training prompts minus mean over the negative ones, summed in float64"
        width = self.model.geometry.d_model
        attrs = {"long_name": "candidate direction: difference of mean residual streams", "units": "activation", "method": method}
        variables = {
            "direction": (("layer", "position", "neuron"), self._blank(width), attrs),
            "norm": (("layer", "position"), self._blank(), {**attrs, "long_name": "length of the candidate direction"}),
        }
        return xr.Dataset(variables, {**self._places(), "neuron": index_coord("neuron", width, "column of the residual stream")})

    def selection(self) -> xr.Dataset:
        """What each candidate does on the validation part, (layer, position)."""
        positive, negative = _MEANS.format("positive"), _MEANS.format("negative")
        texts = {
            "ablated": ("score with the candidate ablated", f"{positive}; {self._ablate}"),
            "drop": ("score as it is minus score with the candidate ablated", f"{positive}; {self._ablate}"),
            "kl": ("KL divergence that ablation makes, KL(as it is || ablated)", f"{negative}; {self._ablate}"),
            "added": ("score with the candidate added", f"{negative}; {self._add}"),
            "rise": ("score with the candidate added minus score as it is", f"{negative}; {self._add}"),
        }
        variables = {
            name: (("layer", "position"), self._blank(), {"long_name": text, "units": "nats", "method": method})
            for name, (text, method) in texts.items()
        }
        return xr.Dataset(variables, self._places(), self.recipe.select.model_dump(mode="json"))

    def tested(self) -> dict[str, xr.Dataset]:
        """The chosen direction, and the test part's scores and texts."""
        found = {"circuit/chosen": self._chosen(), "baseline": self._scores("ordinary forward pass", with_kl=False)}
        found["effects/ablated"] = self._scores(self._ablate)
        found["effects/added"] = self._scores(self._add)
        if self.recipe.generate is not None:
            found["generations"] = self._generations()
        return found

    def _chosen(self) -> xr.Dataset:
        width = self.model.geometry.d_model
        method = f"best on the validation part by {self.recipe.select.by}, of those with KL at most {self.recipe.select.max_kl:g}"
        one = {"units": "1", "method": method}
        variables = {
            "vector": (("direction", "neuron"), np.full((1, width), np.nan, np.float32), {
                "long_name": "chosen direction: difference of mean residual streams", "units": "activation", "method": method}),
            "layer_of": (("direction",), np.full(1, -1), {"long_name": "layer whose incoming stream it is taken from", **one}),
            "place": (("direction",), np.full(1, -1), {"long_name": "its position, from the end of the prompt", **one}),
            "passed": (("direction",), np.full(1, -1, np.int8), {
                "long_name": "1 where it keeps every condition, 0 where no candidate did", **one}),
        }  # fmt: skip
        coords = {
            "direction": index_coord("direction", 1, "chosen direction"),
            "neuron": index_coord("neuron", width, "column of the residual stream"),
        }
        return xr.Dataset(variables, coords)

    def _prompts(self) -> dict[str, Any]:
        which = text_array([self.divided.which[row] for row in self._test])
        return {
            "prompt": index_coord("prompt", self._test, "prompt, by its number in inputs"),
            "set": xr.Variable(("prompt",), which, {"long_name": "set that the prompt belongs to"}),
        }

    def _scores(self, method: str, *, with_kl: bool = True) -> xr.Dataset:
        blank = np.full(len(self._test), np.nan, dtype=np.float32)
        variables: dict[str, Any] = {SCORE: (("prompt",), blank, {**SCORE_ATTRS, "method": method})}
        if with_kl:
            attrs = {"long_name": "KL divergence from the run as it is, KL(as it is || run)", "units": "nats", "method": method}
            variables["kl"] = (("prompt",), blank, attrs)
        return xr.Dataset(variables, self._prompts())

    def _generations(self) -> xr.Dataset:
        assert self.recipe.generate is not None
        steps, count = self.recipe.generate.max_new_tokens, len(self._test)
        how = "greedy" if self.recipe.generate.temperature == 0 else "sampled"
        variables: dict[str, Any] = {}
        methods = {"baseline": "no intervention", "ablated": self._ablate, "added": self._add}
        for name in CONDITIONS:
            method = f"{how}; {methods[name]}, on the prompt and on every generated token"
            attrs = {"units": "1", "method": method}
            ids, texts = np.full((count, steps), -1, dtype=np.int64), text_array([""] * count)
            shown = np.full(count, -1, dtype=np.int8)
            say = f"1 where the text shows {self.recipe.behaviour.name}, else 0"
            variables[f"token_id_{name}"] = (("prompt", "step"), ids, {"long_name": f"generated token ids, {name} (-1: ended)", **attrs})
            variables[f"text_{name}"] = (("prompt",), texts, {"long_name": f"generated text, {name}", **attrs})
            variables[f"shows_{name}"] = (("prompt",), shown, {"long_name": say, **attrs})
        return xr.Dataset(variables, {**self._prompts(), "step": index_coord("step", steps, "generated token, from 0")})
