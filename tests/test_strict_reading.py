"""Files are read strictly: a row that is not used is named with its line, and lines end where lines end."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsp.datasets.pairs import read_pairs
from nsp.errors import InputError
from nsp.experiments.pairs import read_bias_pairs
from nsp.experiments.prompt_options import PromptsFile, read_prompts

ROWS = [
    ("1", "gender_more", '"Women cannot park.'),
    ("1", "gender_less", "Men cannot park."),
    ("2", "gender_more", "She left."),
    ("2", "gender_less", '"He left.'),
    ("3", "gender_more", "She cried."),
    ("3", "gender_less", "He cried."),
]


def table(path: Path, delimiter: str) -> Path:
    lines = [delimiter.join(("pair_id", "type", "text")), *(delimiter.join(row) for row in ROWS)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_quote_in_a_tsv_is_text(tmp_path: Path) -> None:
    pairs = read_bias_pairs(table(tmp_path / "open.tsv", "\t"))
    assert [(pair.more, pair.less) for pair in pairs.pairs] == [
        ('"Women cannot park.', "Men cannot park."),
        ("She left.", '"He left.'),
        ("She cried.", "He cried."),
    ]
    assert not pairs.bad


def test_quotes_around_a_whole_tsv_cell_enclose_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('clean\tcorrupt\tanswer\n"He said ""no""."\tHe said "no".\t a\n', encoding="utf-8")
    (pair,) = read_pairs(path)
    assert pair.clean == pair.corrupt == 'He said "no".'


def test_a_quote_that_is_not_closed_in_a_csv_names_every_line_that_is_lost(tmp_path: Path) -> None:
    pairs = read_bias_pairs(table(tmp_path / "open.csv", ","))
    assert [(pair.more, pair.less) for pair in pairs.pairs] == [("She cried.", "He cried.")]
    (bad,) = pairs.bad
    assert "open.csv:2" in str(bad)
    assert "lines 2 to 5" in str(bad)


def test_a_malformed_row_of_pairs_stops_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('clean,corrupt,answer\nThis,That," a\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.csv:2: malformed row"):
        read_pairs(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_prompts_end_at_line_ends_alone(tmp_path: Path, end: str) -> None:
    texts = ("First line\u2028still the first prompt.", "Second\x85prompt.", "Third\x0cone\x1cis\u2029one.")
    path = tmp_path / "prompts.txt"
    path.write_bytes((end.join(texts) + end).encode())
    assert read_prompts(PromptsFile(path=str(path))) == texts
