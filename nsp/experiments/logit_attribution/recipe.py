"""The recipe of kind ``logit-attribution``: which prompts' logits are taken apart, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from nsp.experiments.pair_options import PairSet, PromptText
from nsp.experiments.selections import as_list
from nsp.recipe import Recipe, RecipeOptions


class AnswerPrompt(RecipeOptions):
    """A prompt and the answer whose logit is taken apart."""

    prompt: PromptText
    """The prompt: a text, chat messages or token ids."""
    answer: str | int
    """One token, with its leading space where the model's tokens have one: " Mary"."""
    distractor: str | int | None = None
    """Another token; then the difference of the two logits is taken apart."""


def _attributed(value: Any) -> Any:
    return {"set": value} if isinstance(value, str) else value


class LogitAttributionRecipe(Recipe):
    """Direct logit attribution: what each component, head or neuron adds to a logit, through the final norm as it is."""

    kind: Literal["logit-attribution"]
    prompts: Annotated[
        Annotated[
            Annotated[tuple[AnswerPrompt, ...], Field(min_length=1), Tag("AnswerPrompt")] | Annotated[PairSet, Tag("PairSet")],
            Discriminator(lambda value: "PairSet" if isinstance(value, dict | PairSet) else "AnswerPrompt"),
        ],
        BeforeValidator(_attributed, json_schema_input_type=str | tuple[PromptText | AnswerPrompt, ...] | PairSet),
    ]
    """Prompts with answers, or a built-in set of pairs, whose clean prompts are taken."""
    answer: Annotated[str | int | None, Field(exclude=True)] = None
    """The answer of prompts that are given without one."""
    distractor: Annotated[str | int | None, Field(exclude=True)] = None
    """The distractor of prompts that are given without an answer."""
    by: Annotated[
        tuple[Literal["component", "head", "neuron"], ...],
        BeforeValidator(as_list, json_schema_input_type=str | list[str]),
        Field(min_length=1),
    ] = ("component", "head")
    """component: embedding, attention and MLP of each layer; head: each head; neuron: each MLP neuron."""
    position: int | Literal["last"] = "last"
    """The position whose prediction is taken apart."""

    @model_validator(mode="before")
    @classmethod
    def _answers_shared(cls, keys: Any) -> Any:
        """Prompts without answers take the recipe's; from then on they are their own."""
        if not isinstance(keys, Mapping) or keys.get("answer") is None or "prompts" not in keys:
            return keys
        shared = {name: keys[name] for name in ("answer", "distractor") if name in keys}
        prompts = [item if isinstance(item, Mapping) else {"prompt": item, **shared} for item in as_list(keys["prompts"])]
        return {**keys, "prompts": prompts}
