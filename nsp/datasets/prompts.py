"""Prompts: texts, chat messages or token ids as one frozen value, with the text of each token and named spans.

A named span is a piece of the prompt's text; its positions are the tokens that share a character with it, found by
character offsets. White space at a span's ends helps to find it and selects nothing, since tokenizers differ in where a
space goes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias

from nsp.datasets.tokens import check_text, check_token_ids, token_bytes, token_texts
from nsp.errors import InputError
from nsp.html import Tokens, card
from nsp.sites import LAST, Selection

if TYPE_CHECKING:
    import torch

Offsets: TypeAlias = tuple[tuple[int, int], ...]
SpanLike: TypeAlias = str | tuple[int, int]


@dataclass(frozen=True, repr=False)
class Prompt:
    """A tokenised prompt of dim (position).

    Attributes:
        text: the prompt as text, after the chat template where there is one; None where only ids are known.
        token_ids: what the model reads: the authority, the texts are for people.
        token_texts: each token for display: a leading space as a space, special tokens by name, bytes that are no text
            alone as escapes.
        offsets: (start, stop) in characters of ``text`` for each token, equal where a token has no text; None where
            unknown.
        spans: (name, positions) pairs.
    """

    text: str | None
    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    offsets: Offsets | None = None
    spans: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InputError("the prompt is empty: it has no token")

    @classmethod
    def from_ids(cls, token_ids: Sequence[int]) -> Prompt:
        """A prompt of bare token ids, without texts."""
        checked = check_token_ids(token_ids, "prompt")
        return cls(None, checked, token_texts(None, checked))

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        spans = "".join(f", {name} @ {','.join(map(str, positions))}" for name, positions in self.spans)
        return f"Prompt({self.title()}{spans})"

    def shown(self) -> Tokens:
        """The tokens for a card, those of named spans marked."""
        return Tokens(self.token_texts, {place: name for name, positions in self.spans for place in positions})

    def _repr_html_(self) -> str:
        spans = [(name, ", ".join(map(str, positions))) for name, positions in self.spans]
        return card("Prompt", f"{len(self)} tokens", facts=[("tokens", self.shown()), *spans])

    def title(self) -> str:
        """The prompt's beginning and length, for messages."""
        shown = "".join(self.token_texts) if self.text is None else self.text
        count = f"{len(self)} token{'s' * (len(self) != 1)}"
        if self.text is None and self.token_texts == token_texts(None, self.token_ids):
            return f"{count}: ids {', '.join(self.token_texts[:6])}{', …' * (len(self) > 6)}"
        return f"{count}: {shown[:40]!r}{'…' * (len(shown) > 40)}"

    @property
    def named_positions(self) -> dict[str, tuple[int, ...]]:
        """Positions by span name, ``last`` included."""
        return {**dict(self.spans), LAST: (len(self) - 1,)}

    def span(self, name: str) -> tuple[int, ...]:
        """The positions of a named span; ``last`` is the final token. InputError lists the known spans."""
        return self.positions(Selection((name,)))

    def positions(self, selection: Selection | None) -> tuple[int, ...]:
        """The positions selected, in the order written; None or ``*`` is all of them.

        Raises InputError, which names the valid range and the known spans.
        """
        if selection is None:
            return tuple(range(len(self)))
        return selection.resolve(len(self), what=lambda: f"position in the prompt ({self.title()})", names=self.named_positions)


PromptLike: TypeAlias = "str | Prompt | Sequence[int] | Sequence[Mapping[str, str]] | torch.Tensor"


def encode(
    tokenizer: Any,
    prompt: PromptLike,
    *,
    spans: Mapping[str, SpanLike] | None = None,
    add_special_tokens: bool = True,
) -> Prompt:
    """Tokenise a prompt and find its named spans.

    Args:
        tokenizer: a transformers tokenizer; None is enough for token ids.
        prompt: text, chat messages (the chat template is applied, with the opening of the answer), token ids, or a
            tensor of ids with dims (position,) or (1, position). A `Prompt` passes as it is.
        spans: name -> a piece of the prompt's text that occurs once, or (start, stop) in characters.
        add_special_tokens: whether a text gets the special tokens (beginning of text) that transformers adds.

    Raises:
        InputError: an empty prompt, wrong types, a missing chat template, a span that is not there or occurs twice.
    """
    encoded = prompt if isinstance(prompt, Prompt) else _encode(tokenizer, prompt, add_special_tokens)
    if not spans:
        return encoded
    positions = dict(encoded.spans) | {name: _find_span(encoded, name, piece) for name, piece in spans.items()}
    return replace(encoded, spans=tuple(positions.items()))


def _encode(tokenizer: Any, prompt: Any, add_special_tokens: bool) -> Prompt:
    if isinstance(prompt, str):
        return _encode_text(tokenizer, prompt, add_special_tokens)
    if isinstance(prompt, Mapping) and "input_ids" in prompt:  # what a tokenizer returns
        prompt = prompt["input_ids"]
    if hasattr(prompt, "tolist"):
        prompt = _tensor_ids(prompt)
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        hint = "; put a chat message into a list" if isinstance(prompt, Mapping) else ""
        raise InputError(f"a prompt is text, a list of chat messages or token ids, not {type(prompt).__name__}{hint}")
    if any(isinstance(part, str) for part in prompt):
        raise InputError("a list of texts is several prompts; give one text")
    if any(isinstance(part, Mapping) for part in prompt):
        return _encode_text(tokenizer, chat_text(tokenizer, prompt), False)
    return _encode_ids(tokenizer, check_token_ids(prompt, "prompt"))


def _tensor_ids(tensor: Any) -> list[Any]:
    values = tensor.tolist()
    if isinstance(values, list) and len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not isinstance(values, list) or any(isinstance(value, list) for value in values):
        raise InputError(f"a prompt tensor has dims (position,) or (1, position), not the shape {tuple(tensor.shape)}")
    return values


def chat_text(tokenizer: Any, messages: Sequence[Any]) -> str:
    """Chat messages as the text of a prompt, with the opening of the answer.

    Raises InputError: no chat template, a message of another form, or messages that the template refuses.
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(f"chat message {number} is {message!r}; a message is a mapping with 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                raise InputError(f"chat message {number}: {key!r} is {message[key]!r}; it must be text")
            check_text(message[key], f"chat message {number}")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "this model's tokenizer has no chat template, so it takes no chat messages; give the prompt as text"
        )
    try:
        return str(
            tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=True, tokenize=False)
        )
    except (
        Exception
    ) as error:  # a template is a program of the model's own: whatever it raises is its view of the messages
        raise InputError(f"the chat template does not take these messages: {error}") from error


def _encode_text(tokenizer: Any, text: str, add_special_tokens: bool) -> Prompt:
    if tokenizer is None:
        raise InputError(
            "this model has no tokenizer, so its prompts are token ids; load it with tokenizer=... to use text"
        )
    check_text(text, "prompt")
    has_offsets = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=has_offsets)
    token_ids = tuple(map(int, encoding["input_ids"]))
    given = tuple(map(tuple, encoding["offset_mapping"])) if has_offsets else None
    # Some tokenizers leave white space out of their offsets, and with it whole tokens, so theirs come second.
    offsets = _match_offsets(tokenizer, token_ids, text, given) or given
    return Prompt(text, token_ids, token_texts(tokenizer, token_ids), offsets)


def _encode_ids(tokenizer: Any, token_ids: tuple[int, ...]) -> Prompt:
    if tokenizer is None:
        return Prompt.from_ids(token_ids)
    text = b"".join(token_bytes(tokenizer, token_ids)).decode("utf-8", "backslashreplace")
    return Prompt(text, token_ids, token_texts(tokenizer, token_ids), _match_offsets(tokenizer, token_ids, text))


def _match_offsets(
    tokenizer: Any, token_ids: tuple[int, ...], text: str, given: Offsets | None = None
) -> Offsets | None:
    """Character offsets from the tokens' bytes laid along the text; None where they do not give the text back.

    ``given`` are the tokenizer's own offsets, which tell a special token in the text from one that was added to it.
    """
    raw = text.encode("utf-8")
    special = set(tokenizer.all_special_ids)
    spread: list[tuple[int, int]] = []
    at = 0
    for position, piece in enumerate(token_bytes(tokenizer, token_ids)):
        if token_ids[position] in special and (given is None or given[position][0] == given[position][1]):
            piece = piece if given is None and raw.startswith(piece, at) else b""  # b"": added by the tokenizer
        elif not raw.startswith(piece, at) and piece.startswith(b" "):
            piece = piece[1:]  # the space that SentencePiece puts before a text is not in it
        if not raw.startswith(piece, at):
            return None
        spread.append((at, at + len(piece)))
        at += len(piece)
    if at != len(raw):
        return None
    starts = list(accumulate(map(len, map(str.encode, text)), initial=0))
    # A token that holds part of a character covers that character, so starts round down and stops round up.
    return tuple(
        [
            (bisect_right(starts, low) - 1, bisect_right(starts, high - 1) if high > low else bisect_right(starts, low) - 1)
            for low, high in spread
        ]
    )


def check_span_name(name: str) -> None:
    """InputError where a span cannot have this name."""
    if not isinstance(name, str):
        raise InputError(f"a span's name is text, not {name!r}")
    if name in (LAST, "all"):
        raise InputError(f"span {name!r}: 'last' is always the final token and 'all' every token; choose another name")
    Selection((name,))


def _find_span(prompt: Prompt, name: str, piece: SpanLike) -> tuple[int, ...]:
    check_span_name(name)
    if prompt.text is None or prompt.offsets is None:
        raise InputError(
            f"span {name!r}: this tokenizer gives no character offsets for the prompt, so spans cannot be found; "
            "give positions by index"
        )
    start, stop = _characters(prompt.text, name, piece)
    covered = tuple(
        position for position, (low, high) in enumerate(prompt.offsets) if low < high and low < stop and start < high
    )
    if not covered:
        raise InputError(f"span {name!r}: no token of the prompt covers {prompt.text[start:stop]!r}")
    return covered


def _characters(text: str, name: str, piece: SpanLike) -> tuple[int, int]:
    """The (start, stop) of a span in characters, without the white space at its ends."""
    if isinstance(piece, str):
        if not piece:
            raise InputError(f"span {name!r} is empty; give a piece of the prompt's text")
        places = [at for at in range(len(text)) if text.startswith(piece, at)]
        if len(places) != 1:
            shown = text if len(text) <= 200 else f"{text[:200]}…"
            where = f" (at characters {', '.join(map(str, places[:5]))})" if places else ""
            way = "give a longer piece, or (start, stop) in characters" if places else "spelling and case must agree"
            raise InputError(
                f"span {name!r}: {piece!r} occurs {len(places)} times in {shown!r}{where}, not once; {way}"
            )
        start, stop = places[0], places[0] + len(piece)
    elif isinstance(piece, tuple | list) and len(piece) == 2 and all(isinstance(place, int) for place in piece):
        start, stop = piece
        if not 0 <= start < stop <= len(text):
            raise InputError(
                f"span {name!r}: characters {start} to {stop} are not in the text of {len(text)} characters"
            )
    else:
        raise InputError(
            f"span {name!r} is {piece!r}; give a piece of the prompt's text, or (start, stop) in characters"
        )
    inner = text[start:stop].strip()
    if not inner:
        return start, stop
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    return start, start + len(inner)
