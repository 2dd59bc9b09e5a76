"""The recipe of kind ``direction``: two sets of prompts, the behaviour that tells them apart, and what is done with it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from nsp.experiments.prompt_options import ChatOptions, DecodingOptions, Prompts, PromptsFile
from nsp.experiments.selections import Indices, listed
from nsp.recipe import Recipe, RecipeOptions
from nsp.recipe_errors import problem_at
from nsp.sites import component

Share = Annotated[float, Field(gt=0, lt=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(listed, json_schema_input_type=str | list[str])]


class BehaviourOptions(RecipeOptions):
    """What a reply with the behaviour looks like."""

    name: Annotated[str, Field(min_length=1)] = "behaviour"
    """What reports call it, such as refusal."""
    openings: Annotated[Texts, Field(min_length=1)]
    """How such replies begin. The score is the log-odds that a reply's first token is the first token of one of them."""
    phrases: Texts = ()
    """A generated text shows the behaviour where it holds one of these (case aside); by default: where it begins with an
    opening."""
    match: Literal["anywhere", "start", "words"] = "anywhere"
    """Where phrases count: anywhere, at the start of the text, or as whole words."""
    at_least: Annotated[int, Field(strict=True, ge=1)] = 1
    """How many different phrases a text must hold."""

    @field_validator("openings", "phrases")
    @classmethod
    def _say_something(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text.strip() for text in texts):
            raise ValueError("an opening or phrase is empty")
        return tuple(dict.fromkeys(texts))

    @model_validator(mode="after")
    def _enough_phrases(self) -> BehaviourOptions:
        if self.at_least > max(1, len(self.phrases)):
            raise ValueError(f"at_least is {self.at_least}, and there are {len(self.phrases)} phrases")
        return self


class SplitOptions(RecipeOptions):
    """Shares of each prompt set; what is left is the test part."""

    train: Share = 0.5
    """The means are taken over these prompts."""
    validation: Share = 0.25
    """The direction is chosen on these."""

    @model_validator(mode="after")
    def _leaves_a_test(self) -> SplitOptions:
        if self.train + self.validation >= 1:
            raise ValueError(f"train {self.train} and validation {self.validation} leave nothing to test on")
        return self


class SelectOptions(RecipeOptions):
    """Which direction is chosen among the candidates, one per layer and position."""

    by: Literal["both", "ablation", "addition"] = "both"
    """The largest drop of the score by ablation on the positive set, the largest rise by addition on the negative set, or
    the smaller of the two."""
    max_kl: Annotated[float, Field(gt=0)] = 0.1
    """Ablation must leave the negative set's next-token distributions this close, in nats (mean KL)."""
    below: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Only layers below this share of the depth: the last ones already write the reply's tokens."""


class SiteOptions(RecipeOptions):
    """Sites to patch between the two sets, with the score as the metric."""

    components: Annotated[Texts, Field(min_length=1)] = ("resid_post", "attn_out", "mlp_out")
    """What is patched, at each of the positions after the instruction."""
    layers: Indices = "all"
    """all, an index, a list, or a slice such as 2:8."""
    heads: bool = False
    """Patch the heads of components that have them one by one."""
    modes: Annotated[
        tuple[Literal["denoising", "noising"], ...],
        BeforeValidator(listed, json_schema_input_type=str | list[str]),
        Field(min_length=1),
    ] = ("denoising", "noising")
    """denoising puts the positive prompt's values into the negative one's run, noising the other way round."""
    pairs: Annotated[int, Field(strict=True, ge=1)] = 6
    """How many pairs of test prompts, at most: prompt i of the one set with prompt i of the other."""

    @field_validator("components")
    @classmethod
    def _know_components(cls, components: tuple[str, ...]) -> tuple[str, ...]:
        for name in components:
            if not component(name).layered or name == "pattern":
                raise ValueError(f"{name} cannot be patched here; take resid_post, attn_out, mlp_out, z or another component")
        return tuple(dict.fromkeys(components))


class DirectionRecipe(Recipe):
    """Find the direction that carries a behaviour, take it out, put it in, and measure what replies become."""

    kind: Literal["direction"]
    positive: Prompts
    """Prompts that bring the behaviour about: a list, or a file."""
    negative: Prompts
    """Prompts that do not."""
    behaviour: BehaviourOptions
    """How the behaviour shows in a reply."""
    chat: ChatOptions = ChatOptions(template=True)
    """How a text becomes a prompt: the chat template, a system message, the beginning of the reply."""
    layers: Indices = "all"
    """Layers whose incoming residual stream gives candidates: all, an index, a list, or a slice such as 2:8."""
    positions: Literal["template"] | Annotated[int, Field(strict=True, ge=1)] = "template"
    """Candidates' positions: the tokens of the chat template after the instruction (without a template the last token),
    or so many tokens from the end."""
    split: SplitOptions = SplitOptions()
    """How the prompts are divided, at random by the recipe's seed."""
    select: SelectOptions = SelectOptions()
    """How the direction is chosen."""
    coefficient: Annotated[float, Field(gt=0)] = 1.0
    """How much of the difference of means is added."""
    generate: DecodingOptions | None = DecodingOptions(max_new_tokens=32)
    """How replies to the test prompts are generated; null generates none."""
    patch: SiteOptions | None = None
    """Patch sites between test prompts of the two sets; by default none."""

    @model_validator(mode="after")
    def _enough_prompts(self) -> DirectionRecipe:
        for key in ("positive", "negative"):
            given = getattr(self, key)
            if not isinstance(given, PromptsFile) and len(given) < 4:
                raise problem_at((key,), f"{len(given)} prompt(s); a direction needs 4 or more, to train, choose and test on")
        return self
