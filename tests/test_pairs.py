"""Prompt pairs and the files that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsp.datasets import Pair, pair, read_pairs
from nsp.errors import InputError
from nsp.sites import Selection

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"
LONG = "When Johnathan and John went to the store, John gave a drink to"


def test_a_pair_as_tokens(tokenizer: Any) -> None:
    found = pair(clean=CLEAN, corrupt=CORRUPT, answer=" Mary", distractor=" John", spans={"place": "the store"})
    encoded = found.encode(tokenizer)
    assert encoded.pair is found
    assert (encoded.clean.text, encoded.corrupt.text) == (CLEAN, CORRUPT)
    assert tokenizer.convert_ids_to_tokens([encoded.answer, encoded.distractor]) == ["ĠMary", "ĠJohn"]
    assert encoded.clean.span("place") == encoded.corrupt.span("place") == (6, 7)
    assert encoded.alignment().shared_prefix == 9


def test_answers_may_be_ids_or_missing(tokenizer: Any) -> None:
    mary = pair(CLEAN, CORRUPT, " Mary").encode(tokenizer).answer
    assert pair(CLEAN, CORRUPT, mary).encode(tokenizer).answer == mary
    encoded = pair(CLEAN, CORRUPT).encode(tokenizer)
    assert (encoded.answer, encoded.distractor) == (None, None)


def test_prompts_of_different_length_are_refused_when_positions_must_match(tokenizer: Any) -> None:
    found = pair(CLEAN, LONG, " Mary", " John", spans={"first": ("Mary", "Johnathan"), "place": "store"}, name="long")
    encoded = found.encode(tokenizer)
    assert encoded.corrupt.span("first") == (1, 2)
    with pytest.raises(InputError, match=r"pair 'long': cannot pair .* the base has 15 tokens, the donor 14"):
        encoded.alignment()
    with pytest.raises(InputError, match="'first' is 2 tokens in the base and 1 token in the donor"):
        encoded.alignment(Selection.of("first"))
    assert encoded.alignment(Selection.of("place")).base_to_donor == ((8, 7),)
    assert encoded.alignment(Selection.of("place,last"), base="clean").base_to_donor == ((7, 8), (13, 14))


def test_spans_by_characters(tokenizer: Any) -> None:
    both = pair(CLEAN, CORRUPT, spans={"who": (38, 42)}).encode(tokenizer)
    assert both.clean.span("who") == both.corrupt.span("who") == (9,)
    mixed = pair(CLEAN, CORRUPT, spans={"who": ((38, 42), "and")}).encode(tokenizer)
    assert (mixed.clean.span("who"), mixed.corrupt.span("who")) == ((9,), (2,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"answer": " unhappinesses"}, "pair 'one': answer ' unhappinesses' is 3 tokens"),
        ({"answer": " Mary", "distractor": " Mary"}, "pair 'one': answer and distractor are the same token"),
        ({"spans": {"who": "Zoe"}}, "pair 'one': span 'who': 'Zoe' occurs 0 times"),
    ],
)
def test_what_a_tokenizer_refuses_names_the_pair(tokenizer: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pair(CLEAN, CORRUPT, name="one", **given).encode(tokenizer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clean": ""}, "clean is empty"),
        ({"corrupt": None}, "corrupt is empty"),
        ({"corrupt": 3}, "corrupt is 3; a prompt is"),
        ({"answer": ""}, "answer is empty"),
        ({"answer": 1.5}, "answer is 1.5"),
        ({"distractor": True}, "distractor is True"),
        ({"spans": {"last": "x"}}, "choose another name"),
        ({"spans": {"a b": "x"}}, "span name 'a b'"),
        ({"spans": {"who": ""}}, "span 'who' is ''"),
        ({"spans": {"who": ("x", "")}}, "span 'who' is"),
        ({"spans": {"who": 3}}, "span 'who' is 3"),
        ({"name": 3}, "name is 3"),
    ],
)
def test_a_pair_is_checked_where_it_is_made(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pair(**({"clean": CLEAN, "corrupt": CORRUPT, "answer": " Mary"} | given))


EXPECTED = [
    Pair("A, b", "A, c", " x", " y", (("subject", "A"), ("where", ("b", "c"))), "one"),
    Pair("two\nlines", "other", " z"),
]


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


def test_csv_with_bom_blank_lines_and_other_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pairs.csv",
        "id,clean, corrupt,answer,distractor,span_subject,span_where_clean,span_where_corrupt,name\r\n"
        "\r\n"
        '7,"A, b","A, c", x, y,A,b,c,one\r\n'
        " , ,,,,,,,\r\n"
        '8,"two\nlines",other, z,,,,,\r\n',
        "utf-8-sig",
    )
    found = read_pairs(path)
    assert found == EXPECTED
    assert [one.origin for one in found] == [f"{path}:3", f"{path}:5"]


def test_tsv(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.TSV", "clean\tcorrupt\tanswer\nA, b\tA, c\t x\n")
    assert read_pairs(path) == [Pair("A, b", "A, c", " x")]


JSON_ROWS = [
    {
        "clean": "A, b",
        "corrupt": "A, c",
        "answer": " x",
        "distractor": " y",
        "spans": {"subject": "A", "where": ["b", "c"]},
        "name": "one",
        "extra": [1],
    },
    {"clean": "two\nlines", "corrupt": "other", "answer": " z", "distractor": None},
]


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in JSON_ROWS]
    path = write(tmp_path / "pairs.jsonl", f"{lines[0]}\r\n\n  \n{lines[1]}", "utf-8-sig")
    found = read_pairs(path)
    assert found == EXPECTED
    assert [one.origin for one in found] == [f"{path}:1", f"{path}:4"]


def test_a_json_list(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.json", json.dumps(JSON_ROWS, indent=1))
    found = read_pairs(str(path))
    assert found == EXPECTED
    assert found[0].origin == f"{path}:2"
    assert found[1].origin == f"{path}:{path.read_text().splitlines().index(' {', 2) + 1}"


def test_json_prompts_may_be_messages_or_ids(tmp_path: Path, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    path = write(tmp_path / "pairs.jsonl", json.dumps({"clean": messages, "corrupt": [1, 2], "answer": 5}))
    encoded = read_pairs(path)[0].encode(tokenizer)
    assert encoded.clean.token_texts[0] == "<|im_start|>"
    assert encoded.corrupt.token_ids == (1, 2)
    assert encoded.answer == 5


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", "answer,more,less,clean\nno,M,L,unused\n")
    found = read_pairs(path, {"clean": "more", "corrupt": "less"})
    assert found == [Pair("M", "L", "no")]
    assert read_pairs(path, {"clean": "more", "corrupt": "answer"}) == [Pair("M", "no", None)]
    with pytest.raises(InputError, match="nsp has no 'prompt'"):
        read_pairs(path, {"prompt": "more"})
    with pytest.raises(InputError, match="no column 'Less' for corrupt; there are 'answer', 'more', 'less', 'clean'"):
        read_pairs(path, {"clean": "more", "corrupt": "Less"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.csv",
            "clean,answer\na,b\n",
            r"p.csv:2: there is no column 'corrupt' for corrupt; there are 'clean', 'answer'",
        ),
        ("p.csv", "clean,corrupt\na,b\n\nc\n", "p.csv:4: the row has 1 cells, the header 2 columns"),
        ("p.csv", "clean,corrupt\na,b,c\n", "p.csv:2: the row has 3 cells, .* double quotes"),
        ("p.csv", 'clean,corrupt\na,"b\nc', "p.csv:2: malformed row"),
        ("p.csv", 'clean,corrupt\na,"b"c\n', "p.csv:2: malformed row"),
        ("p.csv", "clean,corrupt,answer\na,b,\n", "p.csv:2: answer is empty"),
        ("p.csv", "clean,corrupt\n,b\n", "p.csv:2: clean is empty"),
        ("p.csv", "clean,corrupt,clean\na,b,c\n", "p.csv:1: the header has the column 'clean' more than once"),
        ("p.csv", "clean,corrupt,span_s_clean\na,b,x\n", "p.csv:2: span_s_clean and span_s_corrupt go together"),
        ("p.csv", "clean,corrupt,span_last\na,b,x\n", "p.csv:2: span 'last'"),
        ("p.csv", "clean,corrupt,spans\na,b,x\n", "p.csv:2: spans is 'x'"),
        ("p.csv", "clean,corrupt\n", "p.csv: the file has no rows"),
        ("p.csv", "", "the file has no rows"),
        ("p.jsonl", '{"clean": "a", "corrupt": "b"}\n{"clean": \n', r"p.jsonl:2: not JSON: .* \(column"),
        ("p.jsonl", '{"clean": "a", "clean": "b"}\n', "p.jsonl:1: the key 'clean' stands twice"),
        ("p.jsonl", '\n["a", "b"]\n', "p.jsonl:2: expected an object"),
        ("p.jsonl", '{"clean": "a", "corrupt": "b", "answer": 1.5}', "p.jsonl:1: answer is 1.5"),
        ("p.json", '[\n{"clean": "a"}]', "p.json:2: there is no column 'corrupt'"),
        ("p.json", '[\n{"clean": "a", "corrupt": "b"},\n\n3]', "p.json:4: expected an object .* found 3"),
        ("p.json", '[\n{"clean": "a",}]', "p.json:2: not JSON"),
        ("p.json", '{"clean": "a"}', "p.json:1: expected a list of objects, found dict"),
        ("p.json", '[{"a": 1, "a": 2}]', "p.json: the key 'a' stands twice"),
        ("p.txt", "clean,corrupt\n", "p.txt: cannot tell the format; files are read from .csv, .tsv, .jsonl, .json"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_pairs(write(tmp_path / name, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.csv: no such file"):
        read_pairs(tmp_path / "missing.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"folder\.csv: cannot be read"):
        read_pairs(tmp_path / "folder.csv")
    with pytest.raises(InputError, match=r"latin\.csv:2: byte 0xe9 is not UTF-8"):
        read_pairs(write(tmp_path / "latin.csv", "clean,corrupt\nné,b\n", "latin-1"))


def test_a_pair_from_a_file_is_named_by_its_line(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "pairs.csv", "clean,corrupt,answer\na,b, unhappinesses\n")
    with pytest.raises(InputError, match=r"pairs\.csv:2: answer ' unhappinesses' is 3 tokens"):
        read_pairs(path)[0].encode(tokenizer)
