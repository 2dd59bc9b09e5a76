"""What a GGUF file says of its tokenizer, held against the tokenizer that transformers makes of it.

transformers reads the vocabulary, the merges and the special tokens. Whether a beginning-of-text token is put before a
text, how a text is cut into words before the merges, and whether a space is put before it are keys of their own, and a
model that was trained one way gives other numbers the other way. Each key is used, or refused by name.

Source of the expressions that cut texts: llama.cpp, by the names that it gives them (``tokenizer.ggml.pre``).
"""

from __future__ import annotations

from typing import Any

from nsp.errors import InputError
from nsp.models.gguf_metadata import Metadata

_KEY = "tokenizer.ggml."
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_DIGIT = r"\p{N}"
# The expressions that cut a text, one after the other, by the name of a byte-level BPE's pre-tokenizer.
_WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "jina-es", "jina-de", "roberta-bpe"), (_GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "pixtral"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan"), (_QWEN2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (_DIGIT, _GPT2)
    ),
}
# Texts in which the expressions differ: digits, contractions, spaces, line ends, marks, other scripts.
_PROBES = (
    "Hello world", "It's 12345 o'clock, isn't IT'S?", "a  b   c", "x\n\n  y\r\nz", "f(x)=3.14+2*y;", "naïve café – “quote”",
    " leading", "日本語のテキスト 2024年", "1000000 tokens/s", "tab\tand\n\ttab", "don't DON'T", "a_b-c@d.e", "!!! ???", "   ",
)  # fmt: skip
# Facts about the vocabulary that change no text of ordinary words.
_INFORMATIVE = (
    "eot_token_id", "eom_token_id", "eog_token_ids", "prefix_token_id", "suffix_token_id", "middle_token_id", "fim_pre_token_id",
    "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id", "cls_token_id",
    "seperator_token_id", "separator_token_id", "mask_token_id", "token_type_count", "scores", "token_type", "merges", "model",
)  # fmt: skip
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


def apply_tokenizer_keys(metadata: Metadata, tokenizer: Any) -> None:
    """Make the tokenizer do what the file says; InputError that names a key that it cannot follow."""
    keys = {name.removeprefix(_KEY): value for name, value in metadata.values.items() if name.startswith(_KEY)}
    _check_vocabulary(metadata, keys, tokenizer)
    if "pre" in keys and keys.get("model") == "gpt2":
        _cut_words(metadata, str(keys["pre"]), tokenizer)
    for end, default in (("bos", _begins_by_default(keys)), ("eos", None)):
        wanted = keys.get(f"add_{end}_token", default)
        if wanted is not None:
            _add(metadata, tokenizer, end, bool(wanted))
    _check_space(metadata, keys, tokenizer)
    if "tokenizer.chat_template" in metadata.values:
        tokenizer.chat_template = metadata.values["tokenizer.chat_template"]
    known = {
        *_INFORMATIVE, "tokens", "pre", "add_bos_token", "add_eos_token", "add_space_prefix", *(f"{name}_token_id" for name in _SPECIAL)
    }  # fmt: skip
    neutral = {"add_sep_token": False, "remove_extra_whitespaces": False}
    wrong = [name for name, value in keys.items() if name not in known and neutral.get(name, object()) != value]
    others = [name for name in metadata.values if name.startswith("tokenizer.") and not name.startswith((_KEY, "tokenizer.chat_template"))]
    others = [name for name in others if name not in ("tokenizer.huggingface.json",) and not name.startswith("tokenizer.chat_templates")]
    if wrong or others:
        names = ", ".join([*(_KEY + name for name in wrong), *others])
        raise InputError(
            f"{metadata.path} says of its tokenizer what transformers' reader of GGUF files does not use: {names}. "
            "Give the tokenizer of a Hugging Face directory: tokenizer=..."
        )


def check_kept(tokenizer: Any, kept: Any, metadata: Metadata) -> None:
    """InputError where the tokenizer, saved and read again, cuts texts in another way."""
    for text in _PROBES:
        if tokenizer(text)["input_ids"] != kept(text)["input_ids"]:
            raise InputError(f"{metadata.path}: its tokenizer cannot be kept as a Hugging Face tokenizer ({text!r} differs)")


def _begins_by_default(keys: dict[str, Any]) -> bool | None:
    """Whether texts begin with the beginning-of-text token where the file does not say: as llama.cpp decides it."""
    if keys.get("model") == "llama":
        return True
    return True if keys.get("pre") in ("llama-bpe", "llama3", "llama-v3") else None


def _check_vocabulary(metadata: Metadata, keys: dict[str, Any], tokenizer: Any) -> None:
    tokens = keys.get("tokens")
    if tokens is not None:
        vocabulary = tokenizer.get_vocab()
        other = [(number, token) for number, token in enumerate(tokens) if vocabulary.get(token, number) != number]
        if other:
            number, token = other[0]
            raise InputError(f"{metadata.path}: token {number} is {token!r}, and the tokenizer that was made of it gives it another number")
    for name, attribute in _SPECIAL.items():
        special = keys.get(f"{name}_token_id")
        if special is None or tokens is None or special >= len(tokens):
            continue
        if getattr(tokenizer, attribute, None) != special:
            setattr(tokenizer, attribute.removesuffix("_id"), tokens[special])


def _cut_words(metadata: Metadata, pre: str, tokenizer: Any) -> None:
    """Cut texts as the file's pre-tokenizer does, unless the tokenizer does so already."""
    from tokenizers import Regex, pre_tokenizers

    if pre == "default":
        return
    if pre not in _WORDS:
        raise InputError(
            f"{metadata.path}: nsp does not know the pre-tokenizer {pre!r} (tokenizer.ggml.pre), so its words would be cut in another way. "
            "Give the tokenizer of a Hugging Face directory: tokenizer=..."
        )
    backend = tokenizer.backend_tokenizer
    before, kept = [backend.encode(text, add_special_tokens=False).ids for text in _PROBES], backend.pre_tokenizer
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _WORDS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    after = [backend.encode(text, add_special_tokens=False).ids for text in _PROBES]
    if before == after:
        backend.pre_tokenizer = kept


def _add(metadata: Metadata, tokenizer: Any, end: str, wanted: bool) -> None:
    """Put the token of one end at each text, or do not."""
    token = getattr(tokenizer, f"{end}_token_id", None)
    place = 0 if end == "bos" else -1
    if (tokenizer("a")["input_ids"][place] == token) is wanted:
        return
    if wanted and token is None:
        raise InputError(f"{metadata.path}: {_KEY}add_{end}_token is true, and it names no such token ({_KEY}{end}_token_id)")
    setattr(tokenizer, f"add_{end}_token", wanted)
    if (tokenizer("a")["input_ids"][place] == token) is not wanted:
        raise InputError(f"{metadata.path}: the tokenizer cannot follow {_KEY}add_{end}_token = {wanted}")


def _check_space(metadata: Metadata, keys: dict[str, Any], tokenizer: Any) -> None:
    """A SentencePiece tokenizer puts a space before a text unless the file says otherwise; a byte-level one never."""
    byte_level = keys.get("model") == "gpt2"
    wanted = bool(keys.get("add_space_prefix", not byte_level and keys.get("model") == "llama"))
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    first = tokenizer.convert_ids_to_tokens(ids[0]) if ids else ""
    if first and first.startswith(("▁", "Ġ")) is not wanted:
        raise InputError(f"{metadata.path}: the tokenizer cannot follow {_KEY}add_space_prefix = {wanted}")
