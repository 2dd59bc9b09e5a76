"""Target prompts of a patchscope: what is asked of the representation that is put at the placeholder.

``few_shot`` is the token-identity prompt of Ghandeharioun et al. 2024 (Patchscopes, section 4.1), ``describe`` their
entity description; the others are of the same form. A template of one's own is a text with one placeholder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from nsp.datasets.prompts import Prompt, encode
from nsp.errors import InputError

PLACEHOLDER = "?"
Expects = Literal["token", "name", "facts", "answer"]


@dataclass(frozen=True)
class Template:
    """A target prompt.

    Attributes:
        name: its label in results.
        prompt: the text, with one placeholder.
        expects: what a good text says: the source ``token`` itself, the entity's ``name``, ``facts`` about it (its
            strong and partial phrases), or its ``answer`` word for word.
        answer: the expected continuation that is scored; ``{token}``, ``{name}`` and ``{answer}`` are filled in.
        separator: where the answer ends, in prompts that list items.
        asks: the one thing that it asks for, by which an entity's answers are looked up; empty for a description.
    """

    name: str
    prompt: str
    expects: Expects = "facts"
    answer: str = "{answer}"
    separator: str = "\n"
    asks: str = ""


_FACTS = (
    ("Syria", "Country in the Middle East"),
    ("Leonardo DiCaprio", "American actor"),
    ("Samsung", "South Korean electronics company"),
)

_NAMED = (
    ("Syria", "a country in the Middle East"),
    ("Leonardo DiCaprio", "an American actor"),
    ("Samsung", "a South Korean electronics company"),
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("few_shot", "cat -> cat\n1135 -> 1135\nhello -> hello\n?", "token", " -> {token}"),
        Template("identity", "cat -> cat\n1135 -> 1135\nhello -> hello\n? ->", "token", " {token}"),
        Template("describe", "\n".join(f"{name}: {fact}" for name, fact in _FACTS) + "\n?", "facts", ": {answer}"),
        Template(
            "name_then_describe",
            "\n".join(f"{name}: {name} is {fact}" for name, fact in _NAMED) + "\n?",
            "facts",
            ": {name} is {answer}",
        ),
        Template(
            "translate",
            "English: cat French: chat\nEnglish: house French: maison\nEnglish: ? French:",
            "answer",
            " {answer}",
            asks="translate",
        ),
        Template("attribute", "The {attribute} of ? is", "answer", " {answer}", ".", "country"),
    )
}
"""The built-in templates by name."""


def template(name: str, attribute: str = "country") -> Template:
    """A built-in template; ``attribute`` fills the template of that name ("The capital of ? is")."""
    if name not in TEMPLATES:
        raise InputError(f"no template {name!r}; built in are {', '.join(TEMPLATES)}, or give a prompt of your own")
    chosen = TEMPLATES[name]
    if name == "attribute":
        return replace(chosen, prompt=chosen.prompt.replace("{attribute}", attribute), asks=attribute)
    return chosen


def target_prompt(tokenizer: Any, chosen: Template, placeholder: str = PLACEHOLDER) -> tuple[Prompt, int]:
    """The template as the model reads it, and the position of its placeholder.

    Raises InputError, with the tokens, where the placeholder is missing, there twice, several tokens long, or merged
    with a neighbour (white space before it may share its token).
    """
    prompt = encode(tokenizer, chosen.prompt)
    count = chosen.prompt.count(placeholder)
    if count != 1:
        raise InputError(
            f"template {chosen.name!r} has the placeholder {placeholder!r} {count} times, not once. Its tokens: {_tokens(prompt)}"
        )
    prompt = encode(tokenizer, prompt, spans={"placeholder": placeholder})
    positions = prompt.span("placeholder")
    texts = [prompt.token_texts[position] for position in positions]
    if len(positions) != 1:
        raise InputError(
            f"template {chosen.name!r}: the placeholder {placeholder!r} is {len(positions)} tokens, and must be one. Its tokens: "
            f"{_tokens(prompt)}"
        )
    if texts[0].strip() != placeholder.strip():
        raise InputError(
            f"template {chosen.name!r}: the tokenizer merges the placeholder {placeholder!r} with a neighbour into {texts[0]!r}; "
            f"put a space or another sign between them. Its tokens: {_tokens(prompt)}"
        )
    return prompt, positions[0]


def _tokens(prompt: Prompt) -> str:
    return " ".join(repr(text) for text in prompt.token_texts)
