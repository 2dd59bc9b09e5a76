"""Prompt sets in recipes: lists, files, chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from nsp.errors import InputError
from nsp.experiments.labels import prompts_dataset
from nsp.experiments.prompt_options import ChatOptions, DecodingOptions, Prompts, encode_prompts, read_prompts

ADAPTER: TypeAdapter[Any] = TypeAdapter(Prompts)


def read(value: Any) -> tuple[Any, ...]:
    return read_prompts(ADAPTER.validate_python(value))


def test_a_list_keeps_texts_ids_and_messages() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    texts, ids, chat = read(["one", [5, 6], messages])
    assert (texts, list(ids), chat) == ("one", [5, 6], messages)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "first\n\nsecond, with comma\n"),
        ("p.csv", 'prompt,kind\nfirst,a\n"second, with comma",b\n'),
        ("p.tsv", "kind\ttext\na\tfirst\nb\tsecond, with comma\n"),
        ("p.jsonl", '{"text": "first"}\n\n{"text": "second, with comma"}\n'),
        ("p.ndjson", '{"text": "first"}\n{"text": "second, with comma"}\n'),
        ("p.json", '[{"text": "first"}, {"text": "second, with comma"}]'),
    ],
)
def test_files_of_every_form(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert read({"path": str(path)}) == ("first", "second, with comma")
    assert read({"path": str(path), "limit": 1}) == ("first",)


def test_a_quoted_line_break_stays_in_its_field(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt\n"two\nlines"\n', encoding="utf-8")
    assert read(str(path)) == ("two\nlines",)


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("p.csv", "a,b\n1,2\n", {}, "no column prompt or text; it has a, b"),
        ("p.csv", "prompt\nfirst\n\n \n", {}, "p.csv:4: no text in the column prompt"),
        ("p.csv", 'prompt,kind\n"two\nlines",a\n,\n', {}, "p.csv:4: no text in the column prompt"),
        ("p.csv", "prompt,kind\nfirst\n", {}, "p.csv:2: the row has 1 cells, the header 2 columns"),
        ("p.csv", "prompt,prompt\na,b\n", {}, "the column 'prompt' more than once"),
        ("p.jsonl", '{"text": "x"}\nnot json\n', {}, "p.jsonl:2: not JSON"),
        ("p.txt", "\n\n", {}, "holds no prompt"),
        ("p.txt", "x\n", {"column": "y"}, "has no columns"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    tmp_path: Path, name: str, text: str, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read({"path": str(path), **options})


def test_a_missing_file_and_an_empty_list_are_refused() -> None:
    with pytest.raises(ValidationError, match="does not exist"):
        ADAPTER.validate_python("nowhere.txt")
    with pytest.raises(ValidationError):
        ADAPTER.validate_python([])


def test_a_chat_template_opens_the_reply(smollm2: Any) -> None:
    chat = ChatOptions(template=True, system="Be brief.", response="Answer:")
    (prompt,) = encode_prompts(smollm2, ("What is two and two?",), chat)
    text = "".join(prompt.token_texts)
    assert text.count("<|im_start|>") == 3
    assert "Be brief." in text
    assert text.endswith("assistant\nAnswer:")
    with pytest.raises(InputError, match="not token ids"):
        encode_prompts(smollm2, ((5, 6),), chat)
    with pytest.raises(ValidationError, match="template: true"):
        ChatOptions(system="Be brief.")


def test_decoding_options_are_the_engines() -> None:
    decoding = DecodingOptions(max_new_tokens=3, temperature=0.5, seed=7).to_decoding()
    assert (decoding.max_new_tokens, decoding.temperature, decoding.seed, decoding.stop) == (3, 0.5, 7, True)


def test_inputs_label_every_token(smollm2: Any) -> None:
    prompts = [smollm2.encode("The capital of France is"), smollm2.encode("Hi")]
    dataset = prompts_dataset(prompts, names=["france", "hi"])
    assert dict(dataset.sizes) == {"prompt": 2, "position": 5}
    assert dataset["token_text"].values[1].tolist() == ["Hi", "", "", "", ""]
    assert dataset["n_tokens"].values.tolist() == [5, 1]
