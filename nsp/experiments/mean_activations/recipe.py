"""The recipe of kind ``mean-activations``: which components are averaged over which prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nsp.experiments.prompt_options import ChatOptions, Prompts
from nsp.experiments.selections import listed
from nsp.recipe import Recipe
from nsp.recipe_errors import problem_at
from nsp.sites import component


class MeanActivationsRecipe(Recipe):
    """Mean activations over a set of prompts, to ablate with: `nsp.ablate(site, "mean", reference=<the store>)`."""

    kind: Literal["mean-activations"]
    prompts: Prompts | None = None
    """The prompts; by default nsp's small set of neutral sentences."""
    chat: ChatOptions = ChatOptions()
    """How a text becomes a prompt."""
    components: Annotated[
        tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str]), Field(min_length=1)
    ] = ("mlp_neurons", "z", "resid_post")
    """What is averaged, at every layer that has it."""
    over: Literal["tokens", "prompts"] = "tokens"
    """tokens: one mean over all tokens of all prompts; prompts: one a position, over prompts of one length."""
    drop_first: Annotated[int, Field(strict=True, ge=0)] = 0
    """With over: tokens, leave out so many first tokens of each prompt."""

    @field_validator("components")
    @classmethod
    def _have_means(cls, components: tuple[str, ...]) -> tuple[str, ...]:
        for name in components:
            found = component(name)
            if name in ("pattern", "logits") or not found.layered:
                raise ValueError(f"{name} cannot be ablated to a kept mean; take a component that every layer has")
        return tuple(dict.fromkeys(components))

    @model_validator(mode="after")
    def _fits_together(self) -> MeanActivationsRecipe:
        if self.over == "prompts" and self.drop_first:
            raise problem_at(("drop_first",), "has no effect on means a position; leave it out")
        return self
