"""The recipe of kind ``capture``: which activations of which prompts are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from nsp.experiments.prompt_options import ChatOptions, Prompts
from nsp.experiments.selections import Indices, listed
from nsp.recipe import Recipe
from nsp.sites import component


class CaptureRecipe(Recipe):
    """Run prompts once and keep the activations of chosen components, streaming into the store."""

    kind: Literal["capture"]
    prompts: Prompts
    """The prompts: a list, or a txt, csv, tsv or jsonl file of them."""
    chat: ChatOptions = ChatOptions()
    """How a text becomes a prompt."""
    components: Annotated[
        tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str]), Field(min_length=1)
    ] = ("mlp_neurons",)
    """What is kept: any component with layers but the attention pattern."""
    layers: Indices = "all"
    """all, an index, a list, or a slice such as 2:8."""
    keep: Literal["values", "summary"] = "values"
    """values keeps every number; summary only each prompt's maximum (and where it is), mean and mean square."""
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Cut prompts to so many tokens."""

    @field_validator("components")
    @classmethod
    def _have_columns(cls, components: tuple[str, ...]) -> tuple[str, ...]:
        for name in components:
            found = component(name)
            if name == "pattern" or not found.layered:
                raise ValueError(f"{name} has no columns at every layer; record it in a trace instead")
        return tuple(dict.fromkeys(components))
