"""Prompts: token texts that people can read, named spans by character offsets, and clear refusals."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import Letters, byte_level, unigram, word_piece

from nsp.datasets import Prompt, encode, single_token, token_texts
from nsp.errors import InputError
from nsp.sites import Selection

BYTE_LEVEL, UNIGRAM, WORD_PIECE, LETTERS = byte_level(), unigram(), word_piece(), Letters()
IOI = "When Mary and John went to the store, John gave a drink to"


def test_a_text_as_tokens(tokenizer: Any) -> None:
    prompt = encode(tokenizer, IOI)
    assert prompt.token_ids == tuple(tokenizer(IOI)["input_ids"])
    assert prompt.token_texts[:4] == ("When", " Mary", " and", " John")
    assert "".join(prompt.token_texts) == prompt.text == IOI
    assert len(prompt) == 14
    assert prompt.positions(None) == prompt.positions(Selection.of("*")) == tuple(range(14))
    assert repr(prompt) == "Prompt(14 tokens: 'When Mary and John went to the store, Jo'…)"


def test_every_form_of_ids_is_the_same_prompt(tokenizer: Any) -> None:
    text = encode(tokenizer, f"{IOI} 🙃")
    ids = text.token_ids
    forms: list[Any] = [ids, list(ids), np.array(ids), torch.tensor(ids), torch.tensor([ids]), list(np.array(ids))]
    assert all(encode(tokenizer, form) == text for form in forms)
    assert encode(tokenizer, text) is text


def test_chat_messages_take_the_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Where is Paris?"}]
    prompt = encode(tokenizer, messages, spans={"city": "Paris"})
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert prompt.token_ids == tuple(expected["input_ids"])
    assert prompt.token_texts[0] == "<|im_start|>"
    assert prompt.text is not None
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert [prompt.token_texts[at] for at in prompt.span("city")] == [" Paris"]


def test_token_texts_of_byte_level_pieces() -> None:
    prompt = encode(BYTE_LEVEL, "a Mary\0<tool>🙂<|end|>")
    assert prompt.token_texts == (
        *("a", " Mary", "\\x00", "<tool>"),
        *("\\xf0", "\\x9f", "\\x99", "\\x82"),
        "<|end|>",
    )


def test_token_texts_of_sentencepiece_pieces() -> None:
    prompt = encode(UNIGRAM, "Mary and é", spans={"letter": "é", "who": "Mary"})
    assert prompt.token_texts == ("<s>", " Mary", " and", " ", "\\xc3", "\\xa9")
    assert dict(prompt.spans) == {"letter": (4, 5), "who": (1,)}


def test_token_texts_of_word_pieces() -> None:
    assert encode(WORD_PIECE, "Mary and John [CLS]").token_texts == (" mary", " and", " jo", "hn", "[CLS]")


def test_ids_beyond_the_tokenizer_have_a_name() -> None:
    assert token_texts(BYTE_LEVEL, [len(BYTE_LEVEL)]) == (f"<token {len(BYTE_LEVEL)}>",)
    assert token_texts(BYTE_LEVEL, [2**40]) == (f"<token {2**40}>",)
    assert token_texts(LETTERS, [10_000]) == ("<token 10000>",)
    assert token_texts(None, [3, 4]) == ("3", "4")


def test_tokens_added_later_are_seen() -> None:
    tokenizer = byte_level()
    assert token_texts(tokenizer, [len(tokenizer)]) == (f"<token {len(tokenizer)}>",)
    tokenizer.add_tokens(["Ġnew"])
    assert token_texts(tokenizer, [len(tokenizer) - 1]) == ("Ġnew",)


@settings(deadline=None)
@given(st.text(max_size=20))
def test_bytes_lead_back_to_the_text_and_its_offsets(text: str) -> None:
    try:
        prompt = encode(BYTE_LEVEL, text)
    except InputError:
        return
    again = encode(BYTE_LEVEL, prompt.token_ids)
    assert again.text == text
    assert again.offsets == prompt.offsets


@settings(deadline=None)
@given(st.text(st.sampled_from("ab é🙂日Mary"), min_size=1, max_size=20), st.data())
def test_a_span_is_the_tokens_that_share_a_byte_with_it(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    prompt = encode(BYTE_LEVEL, text, spans={"piece": (start, stop)})
    piece = text[start:stop]
    if piece.strip():
        start, piece = start + len(piece) - len(piece.lstrip()), piece.strip()
    low = len(text[:start].encode())
    high = low + len(piece.encode())
    # A byte-level piece has one character a byte.
    sizes = [len(raw) for raw in BYTE_LEVEL.convert_ids_to_tokens(list(prompt.token_ids))]
    ends = list(accumulate(sizes))
    expected = [at for at, end in enumerate(ends) if end - sizes[at] < high and low < end]
    assert prompt.span("piece") == tuple(expected)


def test_spans_by_text_and_by_characters(tokenizer: Any) -> None:
    second = IOI.index("John gave")
    prompt = encode(
        tokenizer,
        IOI,
        spans={"subject": "Mary and John", "again": (second, second + 4), "to": " to the ", "end": "k to"},
    )
    assert prompt.span("subject") == (1, 2, 3)
    assert prompt.span("again") == (9,)
    assert prompt.span("to") == (5, 6)
    assert prompt.span("end") == (12, 13), "a token that only overlaps belongs to the span"
    assert prompt.span("last") == (13,)
    assert prompt.positions(Selection.of("last,again,0,-1")) == (13, 9, 0)
    more = encode(tokenizer, prompt, spans={"again": "store"})
    assert more.span("again") == (7,)
    assert more.span("subject") == (1, 2, 3)


def test_all_pieces_of_a_character_belong_to_its_span(tokenizer: Any) -> None:
    prompt = encode(tokenizer, "so 🙃!", spans={"face": "🙃"})
    texts = [prompt.token_texts[at] for at in prompt.span("face")]
    assert len(texts) > 1
    assert "\\x" in texts[-1]


def test_white_space_tokens_belong_to_a_span() -> None:
    # The tokenizer's own offsets are empty for them, as GPT-2's are.
    assert encode(BYTE_LEVEL, "a \n b", spans={"all-of-it": "a \n b"}).span("all-of-it") == (0, 1, 2, 3, 4)
    assert encode(BYTE_LEVEL, "a\nb", spans={"break": "\n"}).span("break") == (1,)


def test_a_special_token_in_the_text_is_not_the_one_that_was_added() -> None:
    prompt = encode(UNIGRAM, "<s> Mary", spans={"begin": "<s>"})
    assert prompt.token_texts[:2] == ("<s>", "<s>")
    assert prompt.span("begin") == (1,)


def test_spans_in_ids(tokenizer: Any) -> None:
    ids = encode(tokenizer, IOI).token_ids
    assert encode(tokenizer, ids, spans={"subject": "Mary"}).span("subject") == (1,)


def test_spans_without_the_tokenizers_offsets() -> None:
    prompt = encode(LETTERS, "ann sees bob.", spans={"who": "bob"})
    assert prompt.token_texts[:3] == ("<s>", "a", "n")
    assert "".join(prompt.token_texts[at] for at in prompt.span("who")) == "bob"
    with pytest.raises(InputError, match="gives no character offsets"):
        encode(LETTERS, "Ann sees bob.", spans={"who": "bob"})


def test_positions_that_are_not_there_name_what_is(tokenizer: Any) -> None:
    prompt = encode(tokenizer, IOI, spans={"subject": "Mary"})
    with pytest.raises(
        InputError, match=r"14 tokens: 'When Mary .* 14 is out of range; valid is 0 to 13 \(or -14 to -1"
    ):
        prompt.positions(Selection.of(14))
    with pytest.raises(InputError, match="no span 'object'; known are subject, last"):
        prompt.span("object")


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ({"who": "John"}, r"'John' occurs 2 times in .* \(at characters 14, 38\), not once; give a longer piece, or"),
        ({"who": "mary"}, "occurs 0 times .* spelling and case"),
        ({"who": ""}, "is empty"),
        ({"last": "Mary"}, "'last' is always the final token"),
        ({"all": "Mary"}, "choose another name"),
        ({"a b": "Mary"}, "span name 'a b'"),
        ({"who": (3, 3)}, "characters 3 to 3"),
        ({"who": (0, 1000)}, "characters 0 to 1000"),
        ({"who": 3}, "give a piece of the prompt's text"),
        ({3: "Mary"}, "name is text"),
    ],
)
def test_wrong_spans(tokenizer: Any, spans: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encode(tokenizer, IOI, spans=spans)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([-1], "token ids start at 0"),
        ([1, True], "True is not a token id"),
        ([1, 2.0], "2.0 is not a token id"),
        (["one", "two"], "several prompts"),
        (torch.zeros(2, 3, dtype=torch.long), r"shape \(2, 3\)"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.tensor([0.5]), "whole numbers"),
        ({"role": "user", "content": "Hi"}, "put a chat message into a list"),
        (b"bytes", "not bytes"),
        (3, "not int"),
        ("cut \ud83d here", r"character 4 is a lone surrogate \('\\ud83d'\)"),
        ([{"role": "user"}], "a mapping with 'role' and 'content'"),
        ([{"role": "user", "content": None}], "it must be text"),
        ([{"role": "user", "content": "\udc00"}], "chat message 0: character 0 is a lone surrogate"),
        ([{"role": "user", "content": "Hi"}, 3], "chat message 1 is 3"),
    ],
)
def test_wrong_prompts(tokenizer: Any, prompt: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encode(tokenizer, prompt)


def test_a_model_without_a_template_or_a_tokenizer() -> None:
    with pytest.raises(InputError, match="no chat template"):
        encode(BYTE_LEVEL, [{"role": "user", "content": "Hi"}])
    with pytest.raises(InputError, match="no tokenizer"):
        encode(None, "Hi")
    assert encode(None, [3, 4]) == Prompt.from_ids([3, 4])
    assert repr(Prompt.from_ids([3, 4])) == "Prompt(2 tokens: ids 3, 4)"
    with pytest.raises(InputError, match="no character offsets"):
        encode(None, [3, 4], spans={"who": "x"})


def test_what_a_template_refuses_is_an_input_error() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="roles must alternate"):
        encode(tokenizer, [{"role": "user", "content": "Hi"}])


def test_single_tokens(tokenizer: Any) -> None:
    mary: Any = single_token(tokenizer, " Mary")
    assert tokenizer.convert_ids_to_tokens(mary) == "ĠMary"
    assert single_token(tokenizer, mary) == single_token(tokenizer, np.array([mary])[0]) == mary
    assert single_token(tokenizer, "<|im_end|>") == tokenizer.eos_token_id
    assert single_token(None, 7) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            " unhappinesses",
            r"distractor ' unhappinesses' is \d tokens: ' unh' \(18397\), .*; give a text that is one token",
        ),
        ("", "holds no token"),
        ("\ud83d", "lone surrogate"),
        (-1, "start at 0"),
        (True, "not a token id"),
        (None, "not a token id"),
    ],
)
def test_answers_that_are_no_single_token(tokenizer: Any, text: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        single_token(tokenizer, text, what="distractor")


def test_the_near_spelling_that_is_one_token_is_named() -> None:
    with pytest.raises(InputError, match=r"answer 'Mary' is 3 tokens: .*; ' Mary' is one token \(\d+\)"):
        single_token(BYTE_LEVEL, "Mary")
    with pytest.raises(
        InputError, match=r"answer ' Mary' is 2 tokens: ' ' \(\d+\), ' Mary' \(\d+\); 'Mary' is one token"
    ):
        single_token(UNIGRAM, " Mary")


def test_an_answer_outside_the_vocabulary() -> None:
    with pytest.raises(InputError, match=r"'Zoe' is not in the vocabulary \(it becomes '\[UNK\]'\)"):
        single_token(WORD_PIECE, "Zoe")
    with pytest.raises(InputError, match="no tokenizer"):
        single_token(None, " Mary")
