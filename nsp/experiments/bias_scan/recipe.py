"""The recipe of kind ``bias-scan``: which models, which pairs and prompts, what is looked for.

Only the description lives here: checking it needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nsp.errors import InputError
from nsp.experiments.alignment_scan.recipe import AlignmentOptions
from nsp.experiments.bias_pair_options import BiasPairsOptions, PairsOf, Texts
from nsp.experiments.selections import Indices
from nsp.recipe import ModelOptions, NamedModel, Recipe, RecipeOptions, named_model
from nsp.recipe_errors import problem_at
from nsp.sites import Site, component

Positive = Annotated[int, Field(strict=True, ge=1)]


class TwoModels(RecipeOptions):
    """The two models of a scan."""

    aligned: NamedModel
    """The model that donates its activations: the aligned (instruction-tuned, safety-tuned) one."""
    base: NamedModel | None = None
    """The model that receives them; left out, the aligned model itself, with what `ablate` names ablated."""


class NeuronOptions(RecipeOptions):
    """Single neurons, patched one by one."""

    layer: Literal["star"] | Annotated[int, Field(strict=True, ge=0)] = "star"
    """star: each prompt's own star layer; or one layer for all prompts."""
    positions: Literal["last", "all"] = "last"
    """Where a neuron is patched: at the last token, or at all tokens (as many times the cost as there are tokens)."""
    prompts: Annotated[int, Field(strict=True, ge=2)] | None = None
    """Patch neurons on at most so many prompts, whole pairs drawn with the recipe's seed; by default on all."""
    top: Positive = 10
    """How many neurons are called found, and ablated."""
    ablation: Literal["zero", "mean"] = "zero"
    """How the found neurons are ablated; mean is over nsp's neutral sentences."""


class BiasScanRecipe(Recipe):
    """Patch an aligned model's activations into a base model, prompt by prompt, and see where their divergence goes."""

    kind: Literal["bias-scan"]
    models: TwoModels | None = None
    """Two models, {aligned: ..., base: ...}; by default `model` is both."""
    ablate: Texts = ()
    """Sites of the base model that are ablated, such as "mlp_neurons[10] @ *": a model against its own ablation."""
    ablation: Literal["zero", "mean"] = "zero"
    """How: by zero, or by the mean over nsp's neutral sentences."""
    pairs: PairsOf = BiasPairsOptions()
    """The pairs of sentences; both of a pair are prompts."""
    components: Texts = ("mlp_out", "resid_post")
    """What is patched, each on its own; the star layer is that of the first. None ([]): no scan, the pair gap alone."""
    patch: Literal["cumulative", "single", "together"] = "cumulative"
    """cumulative: layers 0 to l for every l; single: one layer at a time; together: all of `layers` at once."""
    layers: Indices = "all"
    """The layers l: all, an index, a list, or a slice such as 2:8."""
    mean_over_positions: bool = False
    """Also the divergence averaged over all positions, beside that at the last."""
    map: Literal["linear"] | None = None
    """For models of different widths: fit a linear map of activations on nsp's neutral sentences."""
    neurons: NeuronOptions | None = NeuronOptions()
    """Patch every single neuron of the star layer; null: do not."""
    alignment: AlignmentOptions | None = None
    """Also scan the aligned model for neurons that fire on harmful prompts, and intersect the two sets."""

    @model_validator(mode="before")
    @classmethod
    def _model_is_base(cls, data: Any) -> Any:
        """`model` is the base model, which the runner loads; what it says beside a name holds for both."""
        if not isinstance(data, dict) or not isinstance(data.get("models"), Mapping):
            return data
        models = data["models"]
        base = named_model(models.get("base") if models.get("base") is not None else models.get("aligned"))
        given = named_model(data.get("model"))
        if not isinstance(base, Mapping) or not (given is None or isinstance(given, Mapping)):
            return data
        if given and given.get("name", base.get("name")) != base.get("name"):
            raise problem_at(("model",), "models names the models; leave model out, or give it device and dtype alone")
        return {**data, "model": {**(given or {}), **{key: value for key, value in base.items() if value is not None}}}

    @field_validator("components")
    @classmethod
    def _know_components(cls, components: tuple[str, ...]) -> tuple[str, ...]:
        for name in components:
            if not component(name).layered or component(name).unit is not None:
                raise InputError(
                    f"{name} is patched whole, layer by layer, and has units or no layers; take mlp_out, attn_out, resid_post"
                )
        return tuple(dict.fromkeys(components))

    @field_validator("ablate")
    @classmethod
    def _parse_sites(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Site.parse(site)) for site in sites)

    @model_validator(mode="after")
    def _fits_together(self) -> BiasScanRecipe:
        if self.patch == "together" and self.neurons is not None and self.neurons.layer == "star":
            raise problem_at(
                ("neurons",), "layers patched together have no star layer; name one (neurons.layer), or set null"
            )
        if not self.components and self.neurons is not None and self.neurons.layer == "star":
            raise problem_at(
                ("neurons",), "without components there is no star layer; name one (neurons.layer), or set null"
            )
        return self

    @property
    def aligned(self) -> ModelOptions:
        """How the aligned model is loaded; device and dtype are the base's unless it says its own."""
        if self.models is None:
            return self.model
        own = self.models.aligned
        shared = {key: getattr(self.model, key) for key in ("device", "dtype") if getattr(own, key) is None}
        return own.model_copy(update=shared)

    def check(self) -> None:
        self.pairs.select(self.pairs.read(), self.seed)
