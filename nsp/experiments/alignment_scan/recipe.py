"""The recipe of kind ``alignment-scan``: which prompts, and what counts as a neuron that fires on harmful ones.

Only the description lives here: checking it needs no model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nsp.experiments.bias_pair_options import BiasPairsOptions, PairsOf
from nsp.experiments.prompt_options import ChatOptions, Prompts
from nsp.experiments.selections import Indices
from nsp.recipe import Recipe, RecipeOptions
from nsp.recipe_errors import problem_at


class AlignmentOptions(RecipeOptions):
    """Neurons that fire on harmful prompts and not on normal ones."""

    harmful_txt: Prompts | None = None
    """Harmful prompts: a file of one per line (or a column of csv, tsv, jsonl), or a list; by default nsp's own."""
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


class AlignmentScanRecipe(Recipe, AlignmentOptions):
    """Find the neurons that fire on harmful prompts and not on normal ones."""

    kind: Literal["alignment-scan"]
    pairs: PairsOf = BiasPairsOptions()
    """The sentences of `auto: pairs`."""

    def check(self) -> None:
        if self.auto == "pairs":
            self.pairs.select(self.pairs.read(), self.seed)
