"""The patchscope recipe: what is read where, what it is put into, and what a good text says."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from nsp.datasets.entities import entities, read_entities
from nsp.experiments.pair_options import PromptText, SpanName
from nsp.experiments.patchscope.templates import PLACEHOLDER, TEMPLATES, Expects, Template, template
from nsp.experiments.prompt_options import DecodingOptions, Prompts
from nsp.experiments.selections import Indices, as_list
from nsp.recipe import DataPath, ModelOptions, Recipe, RecipeOptions
from nsp.recipe_errors import problem_at

Preset = Literal["quick", "targeted", "comprehensive"]
Control = Literal["random", "unrelated"]


Phrases = Annotated[tuple[str, ...], BeforeValidator(as_list, json_schema_input_type=str | list[str])]


class SourceOptions(RecipeOptions):
    """One prompt that a representation is read from. A bare text is the prompt."""

    prompt: PromptText
    """Text, chat messages or token ids."""
    entity: str | None = None
    """Whom or what it is about: a built-in entity, or one of the recipe's facts; its phrases are what is expected."""
    position: int | str | None = None
    """last, an index, or the name of a span, whose last token is read; by default the entity's last token, else last."""
    spans: dict[SpanName, str] = Field(default_factory=dict)
    """Names for parts of the prompt, each a text that occurs once."""
    strong: Phrases = ()
    """Phrases that tell that the text is about this source, in place of the entity's."""
    partial: Phrases = ()
    """Phrases that are about it, and about much else."""
    answer: str | None = None
    """The expected answer, whose log-probability is the automatic score."""


class SourceSet(RecipeOptions):
    """A source for each of a set of entities."""

    entities: Annotated[Phrases, Field(min_length=1)]
    """all, kinds (people, places, things), or names of built-in entities or of the recipe's facts."""
    prompt: str = "I have just been reading about {entity}"
    """The text around each, with {entity} where the name goes; its last token is read."""

    @model_validator(mode="after")
    def _has_place(self) -> SourceSet:
        if self.prompt.count("{entity}") != 1:
            raise problem_at(("prompt",), "needs {entity} once, where the name goes")
        return self


def _sources(value: Any) -> Any:
    if isinstance(value, str):
        return {"entities": [value]}
    if isinstance(value, list | tuple):
        return [{"prompt": item} if isinstance(item, str | list) else item for item in value]
    return value


Sources = Annotated[
    Annotated[tuple[SourceOptions, ...], Field(min_length=1), Tag("SourceOptions")] | Annotated[SourceSet, Tag("SourceSet")],
    Discriminator(lambda value: "SourceSet" if isinstance(value, dict | SourceSet) else "SourceOptions"),
]


class TemplateOptions(RecipeOptions):
    """A target prompt: a built-in one by name, or your own. A bare text is a built-in name, or a prompt."""

    name: str | None = None
    """A built-in template, or a label for your own."""
    prompt: str | None = None
    """Your own prompt, with one placeholder."""
    attribute: str = "country"
    """What the template `attribute` asks for: "The capital of ? is"."""
    expects: Expects | None = None
    """What a good text says: the source token, the entity's name, facts about it, or its answer."""
    answer: str | None = None
    """The continuation that is scored; {token}, {name} and {answer} are filled in."""
    separator: str | None = None
    """Where the answer ends, in a prompt that lists items; by default a line break."""

    @model_validator(mode="after")
    def _exists(self) -> TemplateOptions:
        if self.prompt is None and self.name not in TEMPLATES:
            raise problem_at(
                ("name",), f"no template {self.name!r}; built in are {', '.join(TEMPLATES)}, or give a prompt"
            )
        try:
            (self.answer or "").format(token="", name="", answer="")
        except (KeyError, IndexError, ValueError):
            raise problem_at(("answer",), "takes {token}, {name} and {answer} alone") from None
        return self

    def to_template(self, number: int) -> Template:
        """The template; one that the recipe gives is called by its name, or by its number."""
        if self.prompt is None:
            assert self.name is not None
            base = template(self.name, self.attribute)
        else:
            base = Template(self.name or f"template {number}", self.prompt)
        changed = {key: getattr(self, key) for key in ("expects", "answer", "separator")}
        return replace(base, **{key: value for key, value in changed.items() if value is not None})


def _templates(value: Any) -> Any:
    def spelled(item: Any) -> Any:
        if not isinstance(item, str):
            return item
        is_prompt = item not in TEMPLATES and (" " in item or PLACEHOLDER in item)
        return {"prompt" if is_prompt else "name": item}

    return [spelled(item) for item in as_list(value)]


class MapOptions(RecipeOptions):
    """An affine map from the source model's layers to the target model's, fitted by ridge regression."""

    prompts: Prompts
    """Texts that both models read; the more, the better the map. A fifth of them is held out to judge it."""
    ridge: Annotated[float, Field(gt=0)] = 0.01
    """The penalty on the map's weights, relative to the mean variance of the source's residual stream."""


class PatchscopeRecipe(Recipe):
    """Put a representation of one prompt into another prompt, and let the model say what it holds."""

    kind: Literal["patchscope"]
    sources: Annotated[
        Sources, BeforeValidator(_sources, json_schema_input_type=str | tuple[str | SourceOptions, ...] | SourceSet)
    ]
    """Prompts to read from: a list, or a set of entities (people, places, things, all)."""
    templates: Annotated[
        tuple[TemplateOptions, ...],
        BeforeValidator(_templates, json_schema_input_type=str | list[str | TemplateOptions]),
        Field(min_length=1),
    ] = (TemplateOptions(name="describe"),)
    """Target prompts: few_shot, identity, describe, name_then_describe, translate, attribute, or your own."""
    placeholder: Annotated[str, Field(min_length=1)] = PLACEHOLDER
    """The text in the target prompt whose token is replaced."""
    facts: DataPath | None = None
    """A JSON file of entities: name -> {strong: [...], partial: [...], answer: ...}."""
    preset: Preset | None = None
    """quick: 6 x 6 layers; targeted: every other source layer, the first third of target layers; comprehensive: a coarse
    grid, refined around its hotspots, then compared over the templates."""
    layers: Indices = "all"
    """Source layers, whose resid_post is read: all, an index, a list, or a slice such as 0:12."""
    target_layers: Indices = "all"
    """Target layers, whose resid_post is replaced at the placeholder."""
    controls: tuple[Control, ...] = ("random", "unrelated")
    """Beside the run without a patch: a random vector of the same norm, and another entity's representation."""
    generation: DecodingOptions = DecodingOptions()
    """How the text is generated."""
    top: Annotated[int, Field(strict=True, ge=1)] = 5
    """How many of the most likely first tokens are kept."""
    source_model: Annotated[
        ModelOptions | None,
        BeforeValidator(
            lambda value: {"name": value} if isinstance(value, str) else value,
            json_schema_input_type=str | ModelOptions | None,
        ),
    ] = None
    """Another model to read from."""
    map: MapOptions | None = None
    """A map between the models' residual streams; models of different width need one."""

    @model_validator(mode="after")
    def _fits_together(self) -> PatchscopeRecipe:
        if self.preset is not None:
            for key in ("layers", "target_layers"):
                if getattr(self, key) != "all":
                    raise problem_at((key,), f"the preset {self.preset} chooses the layers; leave one of the two out")
        names = [item.name for item in self.target_templates()]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise problem_at(("templates", index), f"two templates are called {name!r}; give one a name of its own")
        if len(set(self.controls)) != len(self.controls):
            raise problem_at(("controls",), "a control is named twice")
        return self

    def check(self) -> None:
        known = read_entities(self.facts) if self.facts is not None else {}
        if isinstance(self.sources, SourceSet):
            entities([name for name in self.sources.entities if name not in known])

    def target_templates(self) -> tuple[Template, ...]:
        """The target prompts, in order."""
        return tuple(item.to_template(number) for number, item in enumerate(self.templates, 1))
