"""Prompts, prompt pairs, their files, and the matching of token positions between prompts."""

from nsp.datasets.alignment import Alignment, align
from nsp.datasets.pairs import EncodedPair, Pair, pair, read_pairs
from nsp.datasets.prompts import Prompt, PromptLike, encode
from nsp.datasets.tokens import single_token, token_texts

__all__ = [
    "Alignment",
    "EncodedPair",
    "Pair",
    "Prompt",
    "PromptLike",
    "align",
    "encode",
    "pair",
    "read_pairs",
    "single_token",
    "token_texts",
]
