"""The sources and targets of a patchscope, as a model reads them: prompts, positions, what is expected of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsp.datasets.entities import ENTITIES, Entity, entities, read_entities
from nsp.datasets.prompts import Prompt, encode
from nsp.errors import InputError
from nsp.experiments.pair_options import plain_prompt
from nsp.experiments.patchscope.match import Expected, normalised
from nsp.experiments.patchscope.recipe import PatchscopeRecipe, SourceOptions, SourceSet
from nsp.experiments.patchscope.templates import Template, target_prompt
from nsp.sites import Selection

_ENTITY = "entity"


@dataclass(frozen=True)
class Source:
    """A prompt and the position read from it.

    Attributes:
        name: the entity's, or the text of the token read; ``token`` is that text.
        entity: its facts; empty ones where none are known. ``answer`` is one that was given for this source.
    """

    name: str
    prompt: Prompt
    position: int
    entity: Entity
    answer: str | None = None

    @property
    def token(self) -> str:
        """The text of the token read, without the space before it."""
        return self.prompt.token_texts[self.position].strip()

    def answer_to(self, template: Template) -> str:
        """What a template should be answered with; empty where that is not known."""
        if self.answer is not None:
            return self.answer
        return dict(self.entity.answers).get(template.asks, "") if template.asks else self.entity.answer


@dataclass(frozen=True)
class Target:
    """A template on the target model: its tokens and the placeholder's position."""

    template: Template
    prompt: Prompt
    position: int


@dataclass(frozen=True)
class Row:
    """One entry of the ``prompt`` dim: a source read into a template.

    Attributes:
        source, target, unrelated: indices of the source, of the target, and of the source that serves as a control.
        expected: the phrases of a match; None where none are known, and texts are not judged.
        answer: the expected continuation's token ids, empty where there is none; ``answer_text`` as text.
    """

    source: int
    target: int
    unrelated: int
    expected: Expected | None
    answer: tuple[int, ...]
    answer_text: str


def make_sources(tokenizer: Any, recipe: PatchscopeRecipe) -> tuple[Source, ...]:
    """The sources of a recipe, for the source model's tokenizer."""
    known = dict(ENTITIES) | (read_entities(recipe.facts) if recipe.facts is not None else {})
    return tuple(_source(tokenizer, options, known) for options in _options(recipe, known))


def make_targets(tokenizer: Any, recipe: PatchscopeRecipe) -> tuple[Target, ...]:
    """The templates of a recipe, for the target model's tokenizer; InputError where a placeholder is no single token."""
    return tuple(Target(template, *target_prompt(tokenizer, template, recipe.placeholder)) for template in recipe.target_templates())


def unrelated_source(tokenizer: Any, sources: Sequence[Source]) -> Source | None:
    """A further source for the control where the recipe's own are all about one thing; None where they are not."""
    if len({normalised(source.name) for source in sources}) > 1:
        return None
    kind = sources[0].entity.kind
    other = next(
        entity
        for entity in ENTITIES.values()
        if entity.kind != kind and normalised(entity.name) != normalised(sources[0].name)
    )
    return _source(tokenizer, _entity_options(other, SourceSet(entities=(other.name,)).prompt), ENTITIES)


def make_rows(tokenizer: Any, sources: Sequence[Source], targets: Sequence[Target], count: int) -> tuple[Row, ...]:
    """A row for each of the first ``count`` sources and each target, sources first; the others serve as controls."""
    return tuple(
        _row(tokenizer, sources, number, target, targets[target])
        for number in range(count)
        for target in range(len(targets))
    )


def _options(recipe: PatchscopeRecipe, known: Mapping[str, Entity]) -> list[SourceOptions]:
    if not isinstance(recipe.sources, SourceSet):
        return list(recipe.sources)
    chosen: dict[str, Entity] = {}
    for name in recipe.sources.entities:
        chosen |= {name: known[name]} if name in known else {entity.name: entity for entity in entities(name)}
    return [_entity_options(entity, recipe.sources.prompt) for entity in chosen.values()]


def _entity_options(entity: Entity, prompt: str) -> SourceOptions:
    return SourceOptions(prompt=prompt.replace("{entity}", entity.name), entity=entity.name)


def _source(tokenizer: Any, options: SourceOptions, known: Mapping[str, Entity]) -> Source:
    prompt = encode(tokenizer, plain_prompt(options.prompt), spans=options.spans or None)
    name = options.entity
    if name is None and options.position in (None, "last"):
        name = _named(prompt, known)
    if name is not None and name not in known and not (options.strong or options.partial or options.answer):
        raise InputError(
            f"nothing is known of the entity {name!r}: give the source strong or partial phrases or an answer, a file of "
            f"facts, or a built-in entity ({', '.join(ENTITIES)})"
        )
    if (
        name is not None
        and prompt.text is not None
        and prompt.text.count(name) == 1
        and _ENTITY not in dict(prompt.spans)
    ):
        prompt = encode(tokenizer, prompt, spans={_ENTITY: name})
    position = options.position
    if position is None:
        position = _ENTITY if _ENTITY in dict(prompt.spans) else "last"
    at = prompt.span(position)[-1] if isinstance(position, str) else prompt.positions(Selection.of(position))[0]
    facts = known.get(name or "", Entity(name or prompt.token_texts[at].strip()))
    phrases = options.strong or facts.strong, options.partial or facts.partial
    entity = Entity(facts.name, facts.kind, *phrases, facts.answer, facts.answers)
    return Source(entity.name, prompt, at, entity, options.answer)


def _named(prompt: Prompt, known: Mapping[str, Entity]) -> str | None:
    """The known entity that the prompt ends with, the longest name first; None where it ends with none."""
    if prompt.text is None:
        return None
    named = [name for name in known if prompt.text.rstrip().endswith(name) and prompt.text.count(name) == 1]
    return max(named, key=len, default=None)


def _row(tokenizer: Any, sources: Sequence[Source], number: int, target: int, into: Target) -> Row:
    source = sources[number]
    unrelated = _unrelated(sources, number)
    template = into.template
    text, answer = "", source.answer_to(template)
    if "{answer}" not in template.answer or answer:
        text = template.answer.format(token=source.token, name=source.name, answer=answer)
    return Row(number, target, unrelated, _expected(source, template), _continuation(tokenizer, into, text), text)


def _unrelated(sources: Sequence[Source], number: int) -> int:
    """The source for the control: of another kind and with no phrase in common if there is one, the next in the list."""
    source = sources[number]
    others = [*range(number + 1, len(sources)), *range(number)]
    strong = set(map(normalised, source.entity.strong))
    different = [other for other in others if normalised(sources[other].name) != normalised(source.name)]

    def likeness(other: int) -> tuple[bool, bool, int]:
        entity = sources[other].entity
        return (
            bool(strong & set(map(normalised, entity.strong))),
            entity.kind == source.entity.kind,
            others.index(other),
        )

    chosen: int = min(different, key=likeness)
    return chosen


def _expected(source: Source, template: Template) -> Expected | None:
    words = tuple(word for word in source.name.split() if len(word) > 3)
    if template.expects == "token":
        expected = Expected((source.token, source.name), words)
    elif template.expects == "name":
        expected = Expected((source.name,), words)
    elif template.expects == "answer":
        expected = Expected((source.answer_to(template),))
    else:
        expected = Expected(source.entity.strong, source.entity.partial)
    return expected if any(map(normalised, (*expected.strong, *expected.partial))) else None


def _continuation(tokenizer: Any, into: Target, text: str) -> tuple[int, ...]:
    """The tokens of ``text`` as they follow the target prompt."""
    if not text:
        return ()
    whole = encode(tokenizer, into.template.prompt + text).token_ids
    if whole[: len(into.prompt)] == into.prompt.token_ids and len(whole) > len(into.prompt):
        return whole[len(into.prompt) :]
    # The text would merge with the prompt's last token: it is read on its own.
    return encode(tokenizer, text, add_special_tokens=False).token_ids
