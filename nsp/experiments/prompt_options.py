"""Recipe parts that several kinds share: sets of prompts, chat templates, and how text is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from nsp.datasets.table_files import Row, is_table, read_rows, read_text, text_lines
from nsp.errors import InputError
from nsp.experiments.pair_options import PromptText, plain_prompt
from nsp.experiments.selections import as_list
from nsp.recipe import DataPath, RecipeOptions
from nsp.recipe_yaml import SourceText

if TYPE_CHECKING:
    from nsp.datasets.prompts import Prompt
    from nsp.engine.generation import Decoding
    from nsp.model import Model

_COLUMNS = ("prompt", "text")


class PromptsFile(RecipeOptions):
    """Prompts from a file: txt (one per line), or csv, tsv, json or jsonl with a column of them."""

    python_types: ClassVar[tuple[str, ...]] = ("Path",)

    path: DataPath
    """The file, relative to the recipe."""
    column: str | None = None
    """The column of a csv, tsv, json or jsonl file; by default prompt or text."""
    limit: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Take only the first so many."""


def _prompts_form(value: Any) -> str:
    return "PromptsFile" if isinstance(value, Mapping | PromptsFile) else "list"


def _prompts(value: Any) -> Any:
    """A text in a recipe is the path of a file; in Python, where it has no file's ending, a prompt."""
    if isinstance(value, list | tuple | Mapping | PromptsFile):
        return value
    return {"path": value} if is_prompts_path(value) else [value]


def is_prompts_path(value: Any) -> bool:
    """Whether what is given for prompts is the path of a file: a text of a recipe, or one that ends like a file's name."""
    if not isinstance(value, str):
        return False
    return isinstance(value, SourceText) or Path(value).suffix == ".txt" or is_table(value)


Prompts = Annotated[
    Annotated[
        Annotated[tuple[PromptText, ...], Field(min_length=1), Tag("list")] | Annotated[PromptsFile, Tag("PromptsFile")],
        Discriminator(_prompts_form),
    ],
    BeforeValidator(_prompts, json_schema_input_type=str | tuple[PromptText, ...] | PromptsFile),
]
"""A set of prompts: a list of texts (or of lists of chat messages), or a file of them."""


class ChatOptions(RecipeOptions):
    """How a text becomes a prompt of an instruct model."""

    template: bool = False
    """Put each text into the model's chat template as the user's message."""
    system: str | None = None
    """A system message before it."""
    response: str = ""
    """The beginning of the reply, such as "Answer:"."""

    @model_validator(mode="after")
    def _fits_together(self) -> ChatOptions:
        if self.system is not None and not self.template:
            raise ValueError("a system message needs template: true")
        return self


class DecodingOptions(RecipeOptions):
    """How tokens are generated."""

    max_new_tokens: Annotated[int, Field(strict=True, ge=1)] = 20
    """The most tokens to write."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most likely token; above it tokens are drawn."""
    top_k: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Sample among this many likeliest tokens only."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample among the likeliest tokens whose probabilities add up to this."""
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    """Of the draws."""
    stop: bool = True
    """End a text at the model's end-of-sequence token."""

    def to_decoding(self) -> Decoding:
        """The engine's form of it."""
        from nsp.engine.generation import Decoding  # here, so that a recipe is read without torch

        return Decoding(**self.model_dump())


def read_prompts(prompts: Sequence[Any] | PromptsFile) -> tuple[Any, ...]:
    """The prompts of a recipe: texts, token ids, or lists of chat messages. InputError names file and line."""
    if isinstance(prompts, PromptsFile):
        return tuple(_read_file(prompts))
    return tuple(plain_prompt(prompt) for prompt in prompts)


def prompts_key(prompts: Any) -> Any:
    """Prompts given in Python as a recipe's key: the path of a file stays, anything else becomes a list."""
    return str(prompts) if isinstance(prompts, str | Path) else as_list(prompts)


def encode_prompts(model: Model, prompts: Sequence[Any] | PromptsFile, chat: ChatOptions | None = None) -> tuple[Prompt, ...]:
    """The prompts of a recipe as the model reads them, through its chat template where ``chat`` says so."""
    return tuple(model.encode(_chatted(model, prompt, chat)) for prompt in read_prompts(prompts))


def _chatted(model: Model, prompt: Any, chat: ChatOptions | None) -> Any:
    if chat is None or (not chat.template and not chat.response):
        return prompt
    if not chat.template:
        if not isinstance(prompt, str):
            raise InputError("chat.response goes after a text; with token ids or chat messages write it into the prompt")
        return prompt + chat.response
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt[0], int):
        raise InputError("chat.template needs texts or chat messages, not token ids")
    if getattr(model.tokenizer, "chat_template", None) is None:
        raise InputError(f"the tokenizer of {model.name} has no chat template; set chat.template to false")
    from nsp.datasets.prompts import chat_text  # here, so that a recipe is read without it

    system = [{"role": "system", "content": chat.system}] if chat.system is not None else []
    text = chat_text(model.tokenizer, [*system, *prompt])
    # The template writes its own special tokens, so none are added on top.
    return list(model.tokenizer(text + chat.response, add_special_tokens=False)["input_ids"])


def _read_file(file: PromptsFile) -> list[str]:
    if is_table(file.path):
        prompts = _column(read_rows(file.path, blank_rows=True), file)
    elif file.column is not None:
        raise InputError(f"{file.path} holds one prompt a line and has no columns; leave column out")
    else:
        prompts = [line for line in text_lines(read_text(file.path)) if line.strip()]
    if not prompts:
        raise InputError(f"{file.path} holds no prompt")
    return prompts[: file.limit]


def _column(rows: Sequence[Row], file: PromptsFile) -> list[str]:
    texts = []
    for row in rows:
        name = file.column or next((name for name in _COLUMNS if name in row.values), None)
        if name is None or name not in row.values:
            raise InputError(f"{row.where}: no column {file.column or ' or '.join(_COLUMNS)}; it has {', '.join(row.values)}")
        text = row.values[name]
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{row.where}: no text in the column {name}")
        texts.append(text)
    return texts
