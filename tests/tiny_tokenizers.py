"""Tokenizers of a few pieces, one of each kind that token texts and spans must get right."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast


def byte_level() -> Any:
    """GPT-2's kind: one token a byte but for a few merges; offsets without white space; no special tokens added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "ĠM", "ar", "ĠMar", "ĠMary"]
    merges = [("Ġ", "M"), ("a", "r"), ("ĠM", "ar"), ("ĠMar", "y")]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.add_tokens(["<tool>"])
    return made


def unigram() -> Any:
    """Llama 2's kind: ``▁`` for spaces, one in front of every text, bytes as ``<0x..>``, and <s> added."""
    words = ["▁Mary", "▁and", "▁John", "▁", "M", "ary"]
    scored = [("<unk>", 0.0), ("<s>", 0.0), *((word, -1.0) for word in words)]
    scored += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def word_piece() -> Any:
    """BERT's kind: lower case, ``##`` for what continues a word, [UNK] for the rest."""
    pieces = ["[UNK]", "[CLS]", "mary", "jo", "##hn", "and"]
    backend = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]")


class Letters(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer in Python, without offsets: <s> in front, then one token a letter; "?" stands for all others."""

    letters = "?abcdefghijklmnopqrstuvwxyz ."

    def __init__(self) -> None:
        super().__init__(bos_token="<s>", unk_token="?")

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(self.letters)} | dict(self.added_tokens_encoder)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return max(self.letters.find(token), 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: Any = None) -> list[int]:
        return [self.bos_token_id, *token_ids_0]
