"""A kind of experiment that nsp does not have, in one file: where the residual stream gains its length."""

from typing import Any, Literal

import numpy as np
import xarray as xr

from nsp.experiments.experiment import Experiment, Region, Stage, Stored, Values
from nsp.experiments.labels import Group, Variable, index_coord, prompts_dataset
from nsp.experiments.prompt_options import Prompts, encode_prompts
from nsp.recipe import Recipe
from nsp.report.figures import Figure, Lines, figure
from nsp.report.series import mean_series
from nsp.report.summary import Summary


class StreamLengthRecipe(Recipe):
    """Measure how long the residual stream is at the last token of each prompt."""

    kind: Literal["stream-length"]
    prompts: Prompts
    """The prompts."""


class StreamLength(Experiment[StreamLengthRecipe]):
    def prepare(self) -> None:
        self.prompts = encode_prompts(self.model, self.recipe.prompts)
        self.prompt = index_coord("prompt", len(self.prompts), "prompt, from 0")

    def statement(self) -> dict[str, Any]:
        return {"prompts": [list(prompt.token_ids) for prompt in self.prompts]}

    def groups(self) -> dict[str, Group | xr.Dataset]:
        coords = {"prompt": self.prompt, "layer": index_coord("layer", self.model.geometry.n_layers, "layer")}
        length = Variable(("prompt", "layer"), "length of the residual stream", "activation", "ordinary forward pass")
        most = Variable(("prompt",), "layer that adds most length", "1", "from the lengths", np.int32)
        groups = {"activations/resid_post": Group({"length": length}, coords)}
        return {"inputs": prompts_dataset(self.prompts), **groups, "baseline": Group({"most": most}, {"prompt": self.prompt})}

    def stages(self) -> list[Stage]:
        measure = Stage(self._measure, ("activations/resid_post",), split={"prompt": 1})
        return [measure, Stage(self._compare, ("baseline",), split={"prompt": 1}, needs=measure.groups)]

    def _measure(self, region: Region, stored: Stored) -> Values:
        kept = self.engine.record([self.prompts[row] for row in region.indices("prompt")], ["resid_post[*]"])
        layers = [kept.at_last("resid_post", layer).norm(dim=1) for layer in range(self.model.geometry.n_layers)]
        return {"activations/resid_post": {"length": np.stack([layer.numpy() for layer in layers], axis=1)}}

    def _compare(self, region: Region, stored: Stored) -> Values:
        length = stored["activations/resid_post"]["length"].isel(prompt=list(region.indices("prompt")))
        return {"baseline": {"most": length.diff("layer").argmax("layer").values + 1}}

    @classmethod
    def summary(cls, tree: xr.DataTree) -> Summary:
        return Summary("stream length", tuple(f"layer {layer} adds most" for layer in tree["baseline"]["most"].values))

    @classmethod
    def figures(cls, tree: xr.DataTree) -> list[Figure]:
        length = mean_series("resid_post", tree["activations/resid_post"]["length"].load(), "layer")
        return [figure("length", "length by layer", lambda: Lines(series=(length,), x="layer", y="length", units="activation"))]
