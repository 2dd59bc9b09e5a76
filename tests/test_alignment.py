"""Token alignment: only where it is unambiguous, and errors that show both tokenisations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsp.datasets import Alignment, Prompt, align, encode
from nsp.errors import InputError
from nsp.sites import Selection

IOI = "When Mary and John went to the store, John gave a drink to"
LONGER = "When Mary and Johnathan went to the store, John gave a drink to"


def words(text: str, spans: Mapping[str, tuple[int, ...]] | None = None) -> Prompt:
    """A prompt of one token a word; the token id is made of the word's letters."""
    pieces = text.split()
    ids = tuple(int.from_bytes(piece.encode(), "big") for piece in pieces)
    return Prompt(text, ids, tuple(pieces), None, tuple((spans or {}).items()))


def test_equal_length_is_position_by_position() -> None:
    assert align(words("a b c d"), words("a b x d")) == Alignment(4, 4, ((0, 0), (1, 1), (2, 2), (3, 3)), 2)
    assert align(words("a b"), words("a b")).shared_prefix == 2
    assert align(words("a b c"), words("x b c"), Selection.of("1:")).base_to_donor == ((0, 0), (1, 1), (2, 2))


def test_named_spans_pair_prompts_of_different_length() -> None:
    base, donor = words("a S T b", {"subject": (1, 2)}), words("a very long X Y b", {"subject": (3, 4)})
    found = align(base, donor, Selection.of("subject"))
    assert found.base_to_donor == ((1, 3), (2, 4))
    assert (found.base_length, found.donor_length) == (4, 6)
    assert align(base, donor, Selection.of("last")).base_to_donor == ((3, 5),)
    assert align(base, donor, Selection.of("last,subject")).base_to_donor == ((3, 5), (1, 3), (2, 4))


def test_spans_that_moved_are_paired_by_name_in_prompts_of_equal_length() -> None:
    base, donor = words("the S said so", {"subject": (1,)}), words("the old X said", {"subject": (2,)})
    assert align(base, donor, Selection.of("subject")).base_to_donor == ((1, 2),)
    with pytest.raises(InputError, match="stands elsewhere in the donor"):
        align(base, donor, Selection.of("subject,0"))
    assert len(align(base, donor).base_to_donor) == 4
    plain = words("the old X said")
    assert len(align(base, plain, Selection.of("subject")).base_to_donor) == 4, "the donor was given without spans"


def test_the_shared_prefix_ends_where_a_position_is_paired_with_another() -> None:
    # Patching from the donor's second "b" into the base's first changes something although both prompts agree there.
    base, donor = words("a b b c", {"which": (1,)}), words("a b b d", {"which": (2,)})
    assert align(base, donor).shared_prefix == 3
    assert align(base, donor, Selection.of("which")).shared_prefix == 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_an_alignment_is_never_from_the_end(one: list[int], other: list[int]) -> None:
    base, donor = Prompt.from_ids(one), Prompt.from_ids(other)
    if len(one) != len(other):
        for positions in (None, Selection.of("*"), Selection.of(-1), Selection.of(0), Selection.of("last,0")):
            with pytest.raises(InputError, match="What works: prompts of equal token count"):
                align(base, donor, positions)
        return
    found = align(base, donor)
    assert found.base_to_donor == tuple((position, position) for position in range(len(one)))
    prefix = found.shared_prefix
    assert one[:prefix] == other[:prefix]
    assert prefix == len(one) or one[prefix] != other[prefix]


@pytest.mark.parametrize(
    ("base", "donor", "positions", "message"),
    [
        (words("a b"), words("a b c"), "0", "their lengths differ; the base has 2 tokens, the donor 3"),
        (words("a b", {"s": (1,)}), words("a b c"), "s", "the donor has no span 's'"),
        (
            words("a b", {"s": (1,)}),
            words("a b c", {"s": (1, 2)}),
            "s",
            "'s' is 1 token in the base and 2 tokens in the",
        ),
        (words("a b", {"s": (1,)}), words("a b", {"s": (0, 1)}), "s", "What works: positions by index"),
        (words("a b", {"s": (0,), "t": (0,)}), words("a b c", {"s": (0,), "t": (1,)}), "s,t", "positions 0 and 1"),
        (words("a b"), words("a b c"), "s", "no span 's'"),
    ],
)
def test_what_is_ambiguous(base: Prompt, donor: Prompt, positions: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        align(base, donor, Selection.of(positions))


def test_the_error_shows_both_tokenisations(tokenizer: Any) -> None:
    with pytest.raises(InputError) as caught:
        align(encode(tokenizer, IOI), encode(tokenizer, LONGER))
    assert str(caught.value).split("\n") == [
        "cannot pair the prompts' positions: their lengths differ; the base has 14 tokens, the donor 15, "
        "and they part at position 4",
        "  position  base      donor",
        "         0  'When'    'When'",
        "         1  ' Mary'   ' Mary'",
        "         2  ' and'    ' and'",
        "         3  ' John'   ' John'",
        ">        4  ' went'   'athan'",
        "         5  ' to'     ' went'",
        "         6  ' the'    ' to'",
        "         7  ' store'  ' the'",
        "         8  ','       ' store'",
        "         9  ' John'   ','",
        "        10  ' gave'   ' John'",
        "        11  ' a'      ' gave'",
        "        12  ' drink'  ' a'",
        "         …  (2 more)",
        "What works: prompts of equal token count; or positions by the name of a span that both prompts have with "
        "equal token count, for example spans={'subject': '...'} and '@ subject'; or '@ last', the final token of "
        "each.",
    ]


def test_the_listing_keeps_to_the_place_where_long_prompts_part() -> None:
    shared = "same " * 500
    with pytest.raises(InputError) as caught:
        align(words(f"{shared} x 日本 tail"), words(f"{shared} y\n {'long' * 20} tail " + "rest " * 300))
    lines = str(caught.value).split("\n")
    assert len(lines) < 20
    assert lines[2] == "         …  (496 more, the same in both)"
    assert lines[7] == ">      500  'x'     'y'"
    assert lines[8].startswith("       501  '日本'  'longlong")
    assert lines[8].endswith("…"), "a long token is cut"
    assert lines[10] == "       503  (end)   'rest'"
    assert lines[-2] == "         …  (294 more)"


def test_one_prompt_may_be_the_beginning_of_the_other() -> None:
    with pytest.raises(InputError, match="they part at position 2") as caught:
        align(words("a b c"), words("a b"))
    assert ">        2  'c'   (end)" in str(caught.value).split("\n")


def test_bytes_and_control_characters_keep_to_their_row(tokenizer: Any) -> None:
    with pytest.raises(InputError) as caught:
        align(encode(tokenizer, "a\n🙃"), encode(tokenizer, "a\n"))
    text = str(caught.value)
    assert "'\\n'" in text
    assert "'\\xf0\\x9f'" in text
    assert len(text.split("\n")) == 2 + 5 + 1
