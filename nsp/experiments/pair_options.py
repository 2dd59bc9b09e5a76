"""Prompts and pairs of prompts in recipes: a list, a file, or a built-in set."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from nsp.datasets.pair_sets import SETS, CheckedPairs, make_set, pair_set
from nsp.datasets.pairs import PAIR_COLUMNS
from nsp.errors import InputError
from nsp.experiments.selections import SPAN_NAME
from nsp.recipe import DataPath, RecipeOptions

if TYPE_CHECKING:
    from nsp.datasets.pairs import Pair


class Message(RecipeOptions):
    """One chat message."""

    role: str
    """Who speaks, in the chat template's words: system, user, assistant."""
    content: str
    """What is said."""


def _prompt_form(value: Any) -> str:
    if isinstance(value, list | tuple) and value:
        return "Message" if isinstance(value[0], dict | Message) else "ids"
    return "text"


TokenId = Annotated[int, Field(strict=True, ge=0)]
PromptText = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")]
    | Annotated[tuple[TokenId, ...], Tag("ids")]
    | Annotated[tuple[Message, ...], Tag("Message")],
    Discriminator(_prompt_form),
]
"""A prompt: text, token ids, or chat messages."""


def _span_name(name: str) -> str:
    if not SPAN_NAME.fullmatch(name) or name in ("all", "last"):
        raise ValueError(f"{name!r} cannot name a span: letters, digits, _ and - (and not all or last)")
    return name


class SpanTexts(RecipeOptions):
    """A named span that reads differently in the two prompts."""

    clean: Annotated[str, Field(min_length=1)]
    """The span's text in the clean prompt."""
    corrupt: Annotated[str, Field(min_length=1)]
    """The span's text in the corrupt prompt."""


SpanText = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[SpanTexts, Tag("SpanTexts")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "SpanTexts"),
]
SpanName = Annotated[str, AfterValidator(_span_name)]


class PairOptions(RecipeOptions):
    """Two prompts that differ in what matters, and the answer that they tell apart."""

    python_types: ClassVar[tuple[str, ...]] = ("Pair",)

    clean: PromptText
    """The prompt for which the answer is right."""
    corrupt: PromptText
    """The same prompt, changed so that the answer is wrong."""
    answer: str | TokenId | None = None
    """One token, with its leading space where the model's tokens have one: " Mary". For the metric cross_entropy alone
    any number of tokens."""
    distractor: str | TokenId | None = None
    """One token: the answer of the corrupt prompt; `logit_diff` needs it."""
    spans: dict[SpanName, SpanText] = Field(default_factory=dict)
    """Names for parts of the prompts, each a text that occurs once: {subject: Mary}."""
    name: str | None = None
    """A short name for the pair in results."""

    def to_pair(self) -> Pair:
        """The pair as `nsp.pair` makes it."""
        from nsp.datasets.pairs import pair  # here, so that a recipe is read without torch

        spans = {
            name: text if isinstance(text, str) else (text.clean, text.corrupt) for name, text in self.spans.items()
        }
        return pair(
            clean=plain_prompt(self.clean),
            corrupt=plain_prompt(self.corrupt),
            answer=self.answer,
            distractor=self.distractor,
            spans=spans or None,
            name=self.name,
        )


def _pair_column(name: str) -> str:
    if name not in PAIR_COLUMNS:
        if not name.startswith("span_"):
            raise ValueError(f"{name!r} is no column of pairs; there are {', '.join(PAIR_COLUMNS)} and span_<name>")
        _span_name(name.removeprefix("span_"))
    return name


PairColumn = Annotated[str, AfterValidator(_pair_column)]


class PairsFile(RecipeOptions):
    """Pairs from a csv, tsv or jsonl file with the columns clean, corrupt, answer, distractor, name and span_<name>."""

    python_types: ClassVar[tuple[str, ...]] = ("Path",)

    path: DataPath
    """The file, relative to the recipe."""
    columns: dict[PairColumn, str] = Field(default_factory=dict)
    """Which of the file's columns to take for each, where they have other names: {clean: sent_more, span_subject: who}.
    A span that reads differently in the two prompts has two columns, span_<name>_clean and span_<name>_corrupt."""
    failing: Literal["stop", "leave-out"] = "stop"
    """What a pair that fails the token checks does: stop the run, or be left out, counted and named."""


def _set_name(name: str) -> str:
    return pair_set(name).name


class PairSet(RecipeOptions):
    """A built-in set of pairs, made from templates with a seed for the model's tokenizer."""

    set: Annotated[str, AfterValidator(_set_name), Field(json_schema_extra={"enum": list(SETS)})]
    """The set's name."""
    size: Annotated[int, Field(strict=True, ge=1)] | None = None
    """How many pairs; by default the set's own size."""
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    """Of the choice of words; a larger size with the same seed only adds pairs."""


def _pairs_form(value: Any) -> str:
    if isinstance(value, PairSet) or (isinstance(value, dict) and "set" in value):
        return "PairSet"
    return "PairsFile" if isinstance(value, dict | PairsFile) else "PairOptions"


def _pairs(value: Any) -> Any:
    if isinstance(value, dict) and {"clean", "corrupt"} <= set(value):
        return [value]
    if not isinstance(value, str):
        return value
    is_path = re.search(r"[/\\]|\.[A-Za-z]+$", value) is not None
    return {"path" if is_path else "set": value}


Pairs = Annotated[
    Annotated[tuple[PairOptions, ...], Field(min_length=1), Tag("PairOptions")]
    | Annotated[PairsFile, Tag("PairsFile")]
    | Annotated[PairSet, Tag("PairSet")],
    Discriminator(_pairs_form),
]


PairsField = Annotated[
    Pairs,
    BeforeValidator(_pairs, json_schema_input_type=str | PairOptions | tuple[PairOptions, ...] | PairsFile | PairSet),
]
"""Pairs of prompts as a recipe gives them: one, a list, a csv, tsv or jsonl file, or the name of a built-in set."""


def make_pairs(
    pairs: tuple[PairOptions, ...] | PairsFile | PairSet, tokenizer: Any, *, one_token: bool = True
) -> CheckedPairs:
    """The pairs of a recipe for a model: given, read from their file, or a built-in set made for its tokenizer.

    Items of a set (and of a file that leaves them out) that fail the token checks are in ``dropped``; ``one_token`` says
    whether answers are among these checks. InputError where too few are left, or a file is wrong.
    """
    if isinstance(pairs, PairSet):
        return make_set(pairs.set, tokenizer, size=pairs.size, seed=pairs.seed)
    given = given_pairs(pairs)
    if not isinstance(pairs, PairsFile) or pairs.failing == "stop":
        return CheckedPairs(list(given))
    checked = CheckedPairs([])
    for pair in given:
        try:
            (pair if one_token else replace(pair, answer=None, distractor=None)).encode(tokenizer)
            checked.pairs.append(pair)
        except InputError as error:
            checked.dropped.append((str(pair.clean), str(error)))
    if not checked.pairs:
        raise InputError(f"{pairs.path}: no pair is left; the first one fails with: {checked.dropped[0][1]}")
    return checked


def given_pairs(pairs: tuple[PairOptions, ...] | PairsFile) -> tuple[Pair, ...]:
    """Pairs that need no tokenizer. InputError names the file and line that is wrong."""
    if isinstance(pairs, PairsFile):
        from nsp.datasets.pairs import read_pairs  # here, so that a recipe is read without torch

        return tuple(read_pairs(pairs.path, pairs.columns or None))
    return tuple(item.to_pair() for item in pairs)


def plain_prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [item.model_dump() if isinstance(item, Message) else item for item in prompt]
