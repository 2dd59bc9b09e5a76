"""Built-in pair sets: their items, the token checks, seeds and sizes, and that smollm2 knows the tasks."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import nsp
from nsp.datasets.pair_sets import SETS, CheckedPairs, make_set, pair_set
from nsp.datasets.pair_sets.templates import Draft, PairSetKind
from nsp.datasets.pairs import EncodedPair
from nsp.errors import InputError
from nsp.experiments.activation_patching.recipe import ActivationPatchingRecipe

NAMES = ("ioi", "capitals", "greater-than", "subject-verb-agreement", "induction", "docstring")


def word_tokenizer(*, digits: bool = True, without: Iterable[str] = (), marker: str = "Ġ", extra: str = "") -> Any:
    """A tokenizer for which each word of the sets is one token, but for those in ``without``.

    With ``digits`` each digit is a token; else a number is. ``marker`` "▁" is Llama 2's kind, which puts a space before
    every text.
    """
    parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if marker == "Ġ":
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    else:
        parts = [pre_tokenizers.Split("▁", "merged_with_next")]
    before = pre_tokenizers.Sequence(parts)
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    written = spaces.normalize_str if marker == "▁" else str
    pieces = {"<unk>", "▁", *(f"{number}" for number in range(100))}
    for kind in SETS.values():
        for draft in islice(kind.drafts(Random(0)), 3000):
            text = f"{draft.pair.clean}{draft.answers[0][0]}\n{draft.pair.corrupt}{draft.answers[0][1]}"
            pieces |= {piece for piece, _ in before.pre_tokenize_str(written(text))}
    pieces |= {piece for piece, _ in before.pre_tokenize_str(written(extra))}
    pieces -= {f"{marker}{word}" for word in without}
    backend = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(sorted(pieces))}, unk_token="<unk>"))
    backend.pre_tokenizer = before
    if marker == "▁":
        backend.normalizer = spaces
    backend.decoder = decoders.ByteLevel() if marker == "Ġ" else decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def encoded(made: CheckedPairs, tokenizer: Any) -> list[EncodedPair]:
    return [pair.encode(tokenizer) for pair in made.pairs]


def test_the_sets() -> None:
    assert tuple(SETS) == NAMES
    for name, kind in SETS.items():
        assert kind.name == name
        assert kind.description
        assert kind.default_size >= 50


@pytest.mark.parametrize("name", NAMES)
def test_every_item_passes_the_token_checks(name: str, tokenizer: Any) -> None:
    made = make_set(name, tokenizer, size=40, seed=3)
    assert len(made.pairs) == 40
    lengths = defaultdict(set)
    for item in encoded(made, tokenizer):
        assert len(item.clean) == len(item.corrupt)
        assert item.clean.token_ids != item.corrupt.token_ids
        whole = f"{item.pair.clean}{item.pair.answer}", f"{item.pair.corrupt}{item.pair.distractor}"
        for text, prompt, token in zip(whole, (item.clean, item.corrupt), (item.answer, item.distractor), strict=True):
            assert tuple(tokenizer(text)["input_ids"]) == (*prompt.token_ids, token)
        lengths[str(item.pair.name).split(": ")[1]].add(len(item.clean))
        assert item.clean.spans
    if name == "subject-verb-agreement":
        assert {str(pair.answer).strip() for pair in made.pairs} == {"is", "are", "was", "were", "has", "have"}
    assert all(len(found) == 1 for found in lengths.values()), "items of one template have one length"
    assert len({(pair.clean, pair.corrupt) for pair in made.pairs}) == 40


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_pairs_and_a_size_only_adds(name: str, tokenizer: Any) -> None:
    made = make_set(name, tokenizer, size=12, seed=5)
    assert make_set(name, tokenizer, size=20, seed=5).pairs[:12] == made.pairs
    assert make_set(name, tokenizer, size=12, seed=6).pairs != made.pairs


def test_pairs_are_the_same_on_every_machine(tokenizer: Any) -> None:
    (pair,) = make_set("ioi", tokenizer, size=1, seed=0).pairs
    assert pair.clean == "When Maria and Kenneth went to the library, Kenneth gave a toy to"
    assert pair.corrupt == "When Maria and Kenneth went to the library, Maria gave a toy to"
    assert (pair.answer, pair.distractor, pair.name) == (" Maria", " Kenneth", "ioi 0: ABBA 1")


def test_ioi_has_both_orders_and_spans(tokenizer: Any) -> None:
    items = encoded(make_set("ioi", tokenizer, size=40), tokenizer)
    orders = [item.clean.span("io") < item.clean.span("s1") for item in items]
    assert sum(orders) == 20
    for item in items:
        (place,) = item.clean.span("s2")
        assert item.clean.token_ids[place] == item.distractor
        assert item.corrupt.token_ids[place] == item.answer
        differ = [at for at in range(len(item.clean)) if item.clean.token_ids[at] != item.corrupt.token_ids[at]]
        assert differ == [place]


@pytest.mark.parametrize("name", ["induction", "docstring"])
def test_only_the_order_of_words_tells(name: str, tokenizer: Any) -> None:
    for item in encoded(make_set(name, tokenizer, size=20), tokenizer):
        assert sorted(item.clean.token_ids) == sorted(item.corrupt.token_ids)


def test_years(tokenizer: Any) -> None:
    for pair in make_set("greater-than", tokenizer, size=30).pairs:
        spans = dict(pair.spans)
        start, early = (
            str(text)[slice(*span)] for text, span in zip((pair.clean, pair.corrupt), spans["start"], strict=True)
        )
        assert early[2] < str(pair.distractor) < start[2] < str(pair.answer)  # smollm2 reads digit by digit
    pairs = make_set("greater-than", word_tokenizer(), size=5).pairs
    assert all(len(str(pair.answer)) == 1 for pair in pairs)


# --- what fails is named --------------------------------------------------------------------------------------------


def test_items_that_fail_are_counted_and_named() -> None:
    made = make_set("ioi", word_tokenizer(without=["Kenneth", "toy"]), size=30, seed=0)
    assert len(made.pairs) == 30
    assert len(made.dropped) > 0
    for text, reason in made.dropped:
        assert "Kenneth" in text or "toy" in text
        assert "not in the vocabulary" in reason or "<unk>" in reason or "token" in reason
    assert not any("Kenneth" in str(pair.clean) for pair in made.pairs)
    assert made.note().startswith(f"{len(made.dropped)} of {30 + len(made.dropped)} items were left out")
    assert CheckedPairs([]).note() == ""


def test_words_of_several_tokens_fail(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsp.datasets.pair_sets.ioi.NAMES", ("Mary", "John", "Cynthia", "Siobhan"))
    monkeypatch.setattr("nsp.datasets.pair_sets.ioi.PLACES", ("store", "conservatory"))
    made = make_set("ioi", tokenizer, size=10)
    reasons = " ".join(reason for _, reason in made.dropped)
    assert "answer ' Cynthia' is 2 tokens" in reasons
    assert "place 'conservatory' is" in reasons
    assert not any("Siobhan" in str(pair.clean) for pair in made.pairs)


def test_prompts_of_two_lengths_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = Draft("t", nsp.pair("The keys are", "The key is", " on", " in"), ((" on", " in"),), ())
    longer = Draft("t", nsp.pair("The keys are", "The key is now", " on", " in"), ((" on", " in"),), ())
    kind = PairSetKind("two-lengths", "", 1, lambda random: iter([longer, lengths]))
    monkeypatch.setitem(SETS, "two-lengths", kind)
    texts = " ".join(f"{draft.pair.clean} on in {draft.pair.corrupt} on in" for draft in (lengths, longer))
    made = make_set("two-lengths", word_tokenizer(extra=texts))
    assert made.dropped == [("The keys are", "the clean prompt has 3 tokens and the corrupt one 4")]
    assert [pair.clean for pair in made.pairs] == ["The keys are"]


def test_too_few_items_say_why(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nsp.datasets.pair_sets.capitals.CAPITALS", {"France": "Paris", "Italy": "Rome", "Iraq": "Ouagadougou"}
    )
    made = make_set("capitals", tokenizer)  # no size asked for: as many as there are
    assert len(made.pairs) == 2 * 5
    assert len(made.dropped) == 4 * 5
    with pytest.raises(
        InputError, match=r"the set capitals has 10 pairs .* not 11; 20 of 30 items were left out.*Ouagadougou"
    ):
        make_set("capitals", tokenizer, size=11)
    numbers = word_tokenizer(digits=False)
    with pytest.raises(InputError, match="the set greater-than has 0 pairs for this tokenizer and seed"):
        make_set("greater-than", numbers)


def test_names_and_sizes_that_do_not_exist(tokenizer: Any) -> None:
    with pytest.raises(
        InputError, match=r"'agreement'; did you mean 'subject-verb-agreement'\? there are ioi, capitals"
    ):
        pair_set("agreement")
    with pytest.raises(InputError, match="no built-in set of pairs 'xyz'; there are ioi"):
        make_set("xyz", tokenizer)
    with pytest.raises(InputError, match="size 0: give 1 or more"):
        make_set("ioi", tokenizer, size=0)
    with pytest.raises(InputError, match="has no tokenizer; give pairs of token ids"):
        make_set("ioi", None)


def test_answers_are_spelled_as_the_tokenizer_has_them() -> None:
    tokenizer = word_tokenizer(marker="▁")
    made = make_set("capitals", tokenizer, size=10)
    assert not any(str(pair.answer).startswith(" ") for pair in made.pairs)
    for item in encoded(made, tokenizer):
        assert tokenizer(f"{item.pair.clean} {item.pair.answer}")["input_ids"][-1] == item.answer


# --- recipes and the model ------------------------------------------------------------------------------------------


def test_a_recipe_makes_its_set_for_the_model(tokenizer: Any) -> None:
    recipe = ActivationPatchingRecipe(kind="activation-patching", pairs={"set": "ioi", "size": 3, "seed": 2})  # type: ignore[arg-type]
    recipe.check()  # without a model
    assert recipe.make_pairs(tokenizer).pairs == make_set("ioi", tokenizer, size=3, seed=2).pairs
    with pytest.raises(InputError, match="call make_pairs"):
        recipe.read_pairs()


def test_names_are_checked_without_torch() -> None:
    code = "import sys, nsp.datasets.pair_sets as s; s.pair_set('ioi'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_smollm2_knows_the_task(name: str, smollm2: nsp.Model) -> None:
    assert known(smollm2, name, 2) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smollm2_knows_almost_every_item(name: str, smollm2: nsp.Model) -> None:
    assert known(smollm2, name, 60) >= 0.95


def known(model: nsp.Model, name: str, size: int) -> float:
    """The share of items whose answer is preferred in the clean prompt, and more so than in the corrupt one."""
    by_length = defaultdict(list)
    for item in encoded(make_set(name, model.tokenizer, size=size, seed=1), model.tokenizer):
        by_length[len(item.clean)].append(item)
    right = []
    for items in by_length.values():
        ids = torch.tensor([prompt.token_ids for item in items for prompt in (item.clean, item.corrupt)])
        with torch.no_grad():
            logits = model.module(ids, logits_to_keep=1).logits[:, -1]
        for row, item in enumerate(items):
            clean, corrupt = (
                logits[2 * row + at, item.answer] - logits[2 * row + at, item.distractor] for at in (0, 1)
            )
            right.append(bool(clean > 0) and bool(clean > corrupt))
    return sum(right) / len(right)
