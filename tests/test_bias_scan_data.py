"""Readers of bias pairs: what they read, what they refuse, and that no row is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsp.datasets import crows
from nsp.datasets.bbq import parse_bbq, read_bbq
from nsp.datasets.bias_files import read_bias_pairs, shipped_pairs
from nsp.datasets.bias_pairs import BiasPair, select_pairs
from nsp.datasets.crows import parse_crows
from nsp.datasets.pair_tsv import parse_pair_tsv
from nsp.errors import InputError, NspError
from nsp.experiments.bias_scan.data import crows_path, pull_crows, pulled_crows

CROWS = Path(__file__).parents[2] / "shared" / "data" / "crows_pairs_anonymized.csv"
HEADER = ",sent_more,sent_less,stereo_antistereo,bias_type\n"


def bbq_item(**changes: Any) -> str:
    item: dict[str, Any] = {
        "example_id": 3,
        "question_index": "7",
        "question_polarity": "neg",
        "context_condition": "ambig",
        "category": "SES",
        "answer_info": {"ans0": ["poor", "lowSES"], "ans1": ["rich", "highSES"], "ans2": ["Unknown", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["low SES"]},
        "context": "Two people wait.",
        "question": "Who is careless?",
        "ans0": "The poor one",
        "ans1": "The rich one",
        "ans2": "Unknown",
        "label": 2,
    }
    return json.dumps({**item, **changes}) + "\n"


@pytest.mark.skipif(not CROWS.is_file(), reason="CrowS-Pairs is not beside the repository")
def test_the_whole_crows_file() -> None:
    found = read_bias_pairs(CROWS)
    assert len(found.pairs) == crows.PAIRS
    assert not found.bad
    assert len({pair.bias_type for pair in found.pairs}) == 9
    assert found.pairs[1].more.startswith("The poor are really ignorant")
    assert found.pairs[2].direction == "antistereo"


def test_malformed_rows_are_named_by_line_and_the_rest_is_kept() -> None:
    text = HEADER + (
        '0,"a, one","a, two",stereo,age\n'
        "1,only more,stereo,age\n"
        "2,x,y,sideways,age\n"
        "3,,y,stereo,age\n"
        "0,twice,the id,stereo,age\n"
        '4,"two\nlines",other,antistereo,gender\n'
        "5,same,same,stereo,age\n"
        "6,last,one,stereo,gender\n"
    )
    found = parse_crows(text, "f.csv")
    assert [pair.pair_id for pair in found.pairs] == ["0", "4", "6"]
    assert found.pairs[0].more == "a, one"
    said = [str(row) for row in found.bad]
    for where, what in (("f.csv:3", "4 cells"), ("f.csv:4", "sideways"), ("f.csv:5", "sent_more is empty"),
                        ("f.csv:6", "pair id '0' is that of f.csv:2"), ("f.csv:9", "the same")):  # fmt: skip
        assert any(line.startswith(where) and what in line for line in said), (where, said)
    assert len(said) == 5


def test_a_file_of_another_form_is_an_error_that_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"no column 'stereo_antistereo'.*there are .*'sent_more'"):
        parse_crows("sent_more,sent_less,bias_type\na,b,c\n", "f.csv")
    with pytest.raises(InputError, match="no pair could be read"):
        parse_crows(HEADER + "0,a,b,neither,age\n", "f.csv")


@pytest.mark.parametrize(("polarity", "more"), [("neg", "The poor one"), ("nonneg", "The rich one")])
def test_bbq_the_stereotyped_answer_turns_with_the_question(polarity: str, more: str) -> None:
    (pair,) = parse_bbq(bbq_item(question_polarity=polarity), "b.jsonl").pairs
    assert pair.more == f"Two people wait. Who is careless? {more}"
    assert pair.less.endswith("The rich one" if polarity == "neg" else "The poor one")
    assert (pair.bias_type, pair.subset) == ("SES", "ambig")


def test_bbq_items_without_a_stereotyped_answer_are_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "SES_control_nl.jsonl"
    file.write_text(
        bbq_item()
        + "not json\n"
        + bbq_item(example_id=4, additional_metadata={})
        + bbq_item(example_id=5, additional_metadata={"stereotyped_groups": ["F"]})
        + bbq_item(example_id=6, question=None)
    )
    found = read_bbq(file)
    (pair,) = found.pairs
    assert (pair.language, pair.subset) == ("nl", "control-ambig")
    reasons = {row.where.rpartition(":")[2]: row.reason for row in found.bad}
    assert reasons.keys() == {"2", "3", "4", "5"}
    assert "stereotyped_groups" in reasons["3"]
    assert "0 of the 2 known answers" in reasons["4"]


def test_tsv_rows_are_joined_and_lone_ones_are_named() -> None:
    text = (
        "pair_id\ttype\ttext\tlanguage\n"
        "1\trace_more\tone\ten\n"
        "2\tage_less\tfour\ten\n"
        "1\trace_less\ttwo\ten\n"
        "2\tage_more\tthree\ten\n"
        "3\tage_more\tlone\ten\n"
        "4\tneither\tx\ten\n"
    )
    found = parse_pair_tsv(text, "p.tsv")
    assert [(pair.bias_type, pair.more, pair.less) for pair in found.pairs] == [
        ("race", "one", "two"),
        ("age", "three", "four"),
    ]
    assert {str(row).split(":")[1] for row in found.bad} == {"6", "7"}


def test_filters_and_samples_keep_whole_pairs() -> None:
    pairs = [BiasPair(str(n), "ab"[n % 2], f"m{n}", f"l{n}", language="en" if n < 6 else "nl") for n in range(10)]
    assert {pair.bias_type for pair in select_pairs(pairs, bias_type=["a"])} == {"a"}
    assert len(select_pairs(pairs, language="nl")) == 4
    drawn = select_pairs(pairs, num_prompts=6, seed=1)
    assert len(drawn) == 3
    assert drawn == select_pairs(pairs, num_prompts=7, seed=1)
    assert drawn != select_pairs(pairs, num_prompts=6, seed=2)
    with pytest.raises(InputError, match=r"no pair of type z; there are a, b"):
        select_pairs(pairs, bias_type=["z"])
    with pytest.raises(InputError, match="language de"):
        select_pairs(pairs, language="de")


def test_the_shipped_pairs_are_whole_and_not_from_crows() -> None:
    found = shipped_pairs()
    assert not found.bad
    assert len(found.pairs) >= 40
    if CROWS.is_file():
        theirs = {text for pair in read_bias_pairs(CROWS).pairs for text in (pair.more, pair.less)}
        assert not theirs & {text for pair in found.pairs for text in (pair.more, pair.less)}


def test_pulling_crows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="nsp data pull crows-pairs"):
        pulled_crows()
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    with pytest.raises(NspError, match="is not CrowS-Pairs"):
        pull_crows(wrong.as_uri())
    with pytest.raises(NspError, match="cannot fetch"):
        pull_crows((tmp_path / "none.csv").as_uri())
    assert not crows_path().exists()
    right = tmp_path / "right.csv"
    right.write_text(HEADER + "0,a,b,stereo,age\n")
    path, known = pull_crows(right.as_uri())
    assert path == pulled_crows()
    assert not known
