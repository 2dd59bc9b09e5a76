"""Tokens as text: what each token id means, and the id of a text that is one token.

Token ids are the authority; their texts are for people. A leading space is a real space whatever the tokenizer writes
for it (``Ġ``, ``▁``), special tokens appear by their name, and bytes that are no text alone (half an emoji) appear as
``\\xf0\\x9f``.
"""

from __future__ import annotations

import functools
import operator
import re
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from nsp.errors import InputError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_texts(tokenizer: Any, token_ids: Iterable[int]) -> tuple[str, ...]:
    """The text of each token for display; without a tokenizer (None), the ids themselves."""
    if tokenizer is None:
        return tuple(map(str, token_ids))
    return tuple(map(show_bytes, token_bytes(tokenizer, token_ids)))


@functools.lru_cache(maxsize=2**17)
def show_bytes(raw: bytes) -> str:
    """Bytes as text, with escapes for what is no UTF-8, and for NUL, which labelled arrays would drop."""
    return raw.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def token_bytes(tokenizer: Any, token_ids: Iterable[int]) -> tuple[bytes, ...]:
    """The UTF-8 bytes that each token stands for, a leading space included; special tokens by their name."""
    return tuple(map(_vocabulary(tokenizer).__getitem__, token_ids))


def check_token_ids(values: Iterable[Any], what: str) -> tuple[int, ...]:
    """The values as token ids; InputError, which begins with ``what``, where one is no whole number from 0 up."""
    token_ids = []
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise InputError(f"{what}: {value!r} is not a token id; token ids are whole numbers")
        token_ids.append(operator.index(value))
        if token_ids[-1] < 0:
            raise InputError(f"{what}: {value!r} is not a token id; token ids start at 0")
    return tuple(token_ids)


def check_text(text: str, what: str) -> str:
    """The text, where it can be written as UTF-8; a lone surrogate is an InputError that says where it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise InputError(
            f"{what}: character {error.start} is a lone surrogate ({bad!a}), which is no text; "
            "the text was probably cut inside an emoji or read with the wrong encoding"
        ) from None
    return text


def single_token(tokenizer: Any, text: str | int, *, what: str = "answer") -> int:
    """The id of a text that is exactly one token; ids pass.

    ``what`` names the text in errors ("distractor"). Raises InputError where the text is several tokens or not in the
    vocabulary; the message shows the tokens and which near spelling is one token.
    """
    if not isinstance(text, str):
        return check_token_ids([text], what)[0]
    if tokenizer is None:
        raise InputError(f"{what} {text!r}: this model has no tokenizer; give a token id")
    ids = _encode_alone(tokenizer, check_text(text, f"{what} {text!a}"))
    if len(ids) == 1:
        if ids[0] == tokenizer.unk_token_id and text.strip() != tokenizer.unk_token:
            raise InputError(f"{what} {text!r} is not in the vocabulary (it becomes {tokenizer.unk_token!r})")
        return ids[0]
    if not ids:
        raise InputError(f"{what} {text!r} holds no token; give a text that is one token, or a token id")
    shown = ", ".join(f"{piece!r} ({token})" for piece, token in zip(token_texts(tokenizer, ids), ids, strict=True))
    near = text[1:] if text.startswith(" ") else f" {text}"
    spelled = _encode_alone(tokenizer, near)
    advice = f"; {near!r} is one token ({spelled[0]})" if len(spelled) == 1 and near.strip() else ""
    raise InputError(
        f"{what} {text!r} is {len(ids)} tokens: {shown}{advice}; give a text that is one token, or a token id"
    )


def continuation_ids(tokenizer: Any, continuation: Iterable[str | int]) -> tuple[int, ...]:
    """The token ids of a continuation: texts of any number of tokens, and token ids, one after the other."""
    ids: list[int] = []
    for part in continuation:
        if not isinstance(part, str):
            ids += check_token_ids([part], "continuation")
        elif tokenizer is None:
            raise InputError(f"continuation {part!r}: this model has no tokenizer; give token ids")
        else:
            ids += _encode_alone(tokenizer, check_text(part, f"continuation {part!a}"))
    if not ids:
        raise InputError("the continuation is empty; give a text, such as ' Mary and John'")
    return tuple(ids)


def _encode_alone(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []


class _Vocabulary(dict[int, bytes]):
    """Token id -> bytes for one tokenizer, filled as ids are met."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.reference = weakref.ref(tokenizer)
        self.size = len(tokenizer)
        self.named = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
        self.byte_level = _is_byte_level(tokenizer)

    def __missing__(self, token: int) -> bytes:
        tokenizer: Any = self.reference()
        try:
            piece = tokenizer.convert_ids_to_tokens(token)
        except (LookupError, OverflowError):
            piece = None
        if piece is None:
            # Embeddings are often padded beyond the tokenizer's vocabulary; such an id is valid and has no text.
            raw = f"<token {token}>".encode()
        elif isinstance(piece, bytes):
            raw = piece
        elif token in self.named:
            raw = piece.encode()
        elif self.byte_level:
            raw = b"".join(_BYTE_OF[char] if char in _BYTE_OF else char.encode() for char in piece)
        else:
            raw = _decoded(tokenizer, token, piece)
        self[token] = raw
        return raw


def _decoded(tokenizer: Any, token: int, piece: str) -> bytes:
    """A token's bytes from the tokenizer's own decoder.

    Decoders drop the leading space of a text's first token, so the token is decoded twice over and its second copy is
    taken.
    """

    def decode(token_ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(list(token_ids), **options))

    once, twice = decode([token]), decode([token, token])
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte and once != piece:
        return bytes.fromhex(byte[1])
    return (twice.removeprefix(once) if twice.startswith(once) else once).encode("utf-8", "replace")


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary writes bytes as GPT-2 does, one printable character a byte."""
    if hasattr(tokenizer, "byte_decoder"):
        return True
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the rest are shifted to 256 and up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(shifted)}


_BYTE_OF = _byte_alphabet()
_VOCABULARIES: weakref.WeakKeyDictionary[Any, _Vocabulary] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> _Vocabulary:
    known = _VOCABULARIES.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _VOCABULARIES[tokenizer] = _Vocabulary(tokenizer)
    return known
