"""The recipes of kinds ``bias-scan`` and ``alignment-scan``: which models, which pairs and prompts, what is looked for.

Only the description lives here: checking it needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nsp.datasets.bias_pairs import BiasPair, BiasPairs, select_pairs
from nsp.errors import InputError
from nsp.experiments.patching.recipe import Indices
from nsp.experiments.prompt_options import ChatOptions, Prompts
from nsp.experiments.selections import listed
from nsp.recipe import DataPath, ModelOptions, Recipe, RecipeOptions
from nsp.recipe_errors import problem_at
from nsp.sites import Site, component

BIAS_KIND = "bias-scan"
ALIGNMENT_KIND = "alignment-scan"
Positive = Annotated[int, Field(strict=True, ge=1)]


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Named = Annotated[ModelOptions, BeforeValidator(_named, json_schema_input_type=str | ModelOptions)]
Texts = Annotated[tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str])]


class TwoModels(RecipeOptions):
    """The two models of a scan."""

    aligned: Named
    """The model that donates its activations: the aligned (instruction-tuned, safety-tuned) one."""
    base: Named | None = None
    """The model that receives them; left out, the aligned model itself, with what `ablate` names ablated."""


class BiasPairsOptions(RecipeOptions):
    """Pairs of sentences, and which of them. A bare text is the path."""

    path: DataPath | None = None
    """A file: CrowS-Pairs csv, BBQ or MBBQ jsonl, or a tsv of <type>_more and <type>_less rows."""
    source: Literal["shipped", "crows-pairs"] = "shipped"
    """Where no path is given: nsp's own small set, or CrowS-Pairs as `nsp data pull crows-pairs` fetched it."""
    format: Literal["auto", "crows", "bbq", "tsv"] = "auto"
    """The file's form; auto goes by its ending and columns."""
    bias_type: Texts = ()
    """Only these types, such as [gender, age]; by default all."""
    language: str | None = None
    """Only this language, such as nl."""
    subset: str | None = None
    """Only this part: stereo or antistereo of CrowS-Pairs, ambig or disambig of BBQ."""
    num_prompts: Annotated[int, Field(strict=True, ge=2)] | None = None
    """At most so many prompts, two a pair, drawn with the recipe's seed; by default all."""

    def read(self) -> BiasPairs:
        """Every pair of the file, and the rows that are none."""
        from nsp.datasets.bias_files import read_bias_pairs, shipped_pairs
        from nsp.experiments.bias_scan.data import pulled_crows

        if self.path is not None:
            return read_bias_pairs(self.path, self.format)
        if self.source == "shipped":
            return shipped_pairs()
        return read_bias_pairs(pulled_crows(), "crows")

    def select(self, pairs: BiasPairs, seed: int) -> tuple[BiasPair, ...]:
        """The pairs that the filters keep. InputError where a set of nsp's has fewer than are asked for."""
        kept = select_pairs(
            pairs.pairs,
            bias_type=self.bias_type,
            language=self.language,
            subset=self.subset,
            num_prompts=self.num_prompts,
            seed=seed,
        )
        if self.path is None and self.num_prompts is not None and self.num_prompts > 2 * len(kept):
            raise InputError(
                f"pairs.num_prompts: the set {self.source!r} has {2 * len(kept)} prompts that pass the filters, not {self.num_prompts}"
            )
        return kept


def _path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


PairsOf = Annotated[BiasPairsOptions, BeforeValidator(_path, json_schema_input_type=str | BiasPairsOptions)]


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


class AlignmentOptions(RecipeOptions):
    """Neurons that fire on harmful prompts and not on normal ones."""

    harmful_txt: Prompts | None = None
    """Harmful prompts: a file of one a line (or a column of csv, tsv, jsonl), or a list; by default nsp's own."""
    normal_txt: Prompts | None = None
    """Normal prompts, in the same form."""
    auto: Literal["pairs", "refusals"] | None = None
    """Derive the two sets: the more and the less sentences of `pairs`, or the prompts that the model refuses and those
    that it answers."""
    chat: ChatOptions = ChatOptions()
    """Put prompts through the model's chat template."""
    layers: Indices = "all"
    """all, an index, a list, or a slice such as 2:8."""
    reduce: Literal["last", "mean", "max"] = "mean"
    """A neuron's value on a prompt: at the last token, or the mean or the maximum over tokens."""
    sigma: Annotated[float, Field(gt=0)] = 2.0
    """A neuron fires above mean + sigma x standard deviation of its values on normal prompts."""
    min_precision: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of the prompts on which a neuron fires, at least this share must be harmful."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The false discovery rate (Benjamini-Hochberg) over all neurons."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The share of prompts kept out of the search, on which what was found is tried again."""

    @model_validator(mode="after")
    def _one_way(self) -> AlignmentOptions:
        if self.auto == "pairs" and (self.harmful_txt is not None or self.normal_txt is not None):
            raise problem_at(
                ("auto",), "auto: pairs takes the sentences of pairs; leave harmful_txt and normal_txt out"
            )
        if self.auto is None and (self.harmful_txt is None) != (self.normal_txt is None):
            missing = "normal_txt" if self.normal_txt is None else "harmful_txt"
            raise problem_at((missing,), "harmful_txt and normal_txt go together")
        return self


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
        base = _named(models.get("base") if models.get("base") is not None else models.get("aligned"))
        given = _named(data.get("model"))
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


class AlignmentScanRecipe(Recipe, AlignmentOptions):
    """Find the neurons that fire on harmful prompts and not on normal ones."""

    kind: Literal["alignment-scan"]
    pairs: PairsOf = BiasPairsOptions()
    """The sentences of `auto: pairs`."""

    def check(self) -> None:
        if self.auto == "pairs":
            self.pairs.select(self.pairs.read(), self.seed)
