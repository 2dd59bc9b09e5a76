"""Built-in sets of prompt pairs, made from templates with a seed. They are part of nsp and under its licence.

A set is made for one tokenizer: an item counts only where its answer and distractor are one token each that follows the
prompt, its words are one token each (so that items of a template have one length), and its two prompts are equally
long. Items that fail are not in the set; they are counted and named, and others are made in their place.

The same name, size, seed and tokenizer give the same pairs; a larger size only adds pairs. Every slot of a template is
a span of its name: ``positions: s2`` in a recipe with the set ioi.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from nsp.datasets.pair_sets import agreement, capitals, docstring, greater_than, induction, ioi
from nsp.datasets.pair_sets.templates import Draft, PairSetKind
from nsp.datasets.pairs import EncodedPair, Pair
from nsp.datasets.prompts import encode
from nsp.datasets.tokens import single_token
from nsp.errors import InputError, suggestion

SETS: dict[str, PairSetKind] = {
    family.KIND.name: family.KIND for family in (ioi, capitals, greater_than, agreement, induction, docstring)
}
# A set is at its end when as many drafts in a row bring nothing new, or fail.
_PATIENCE = 400


@dataclass(frozen=True)
class CheckedPairs:
    """Pairs that pass the checks for a tokenizer, and the items that were left out: (clean prompt, reason)."""

    pairs: list[Pair]
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def note(self, shown: int = 3) -> str:
        """What was left out and why, in one line with ``shown`` reasons; empty where nothing was."""
        if not self.dropped:
            return ""
        reasons = Counter(reason for _, reason in self.dropped).most_common()
        listed = "; ".join(f"{reason}{f' ({count} times)' if count > 1 else ''}" for reason, count in reasons[:shown])
        rest = f"; and {len(reasons) - shown} other reasons" if len(reasons) > shown else ""
        total = len(self.pairs) + len(self.dropped)
        return f"{len(self.dropped)} of {total} items were left out and made anew: {listed}{rest}"


def pair_set(name: str) -> PairSetKind:
    """The set of this name; InputError, with the nearest name, where there is none."""
    if name not in SETS:
        near = suggestion(name, SETS, cutoff=0.5)
        raise InputError(f"there is no built-in set of pairs {name!r}{near or ';'} there are {', '.join(SETS)}")
    return SETS[name]


def make_set(name: str, tokenizer: Any, *, size: int | None = None, seed: int = 0) -> CheckedPairs:
    """Make a built-in set for a tokenizer.

    Args:
        name: one of `SETS`.
        size: how many pairs; by default the set's ``default_size``, or all there are where they are fewer.
        seed: of the choice of words.

    Raises:
        InputError: an unknown name; no tokenizer; fewer items than asked for pass the checks (it says why).
    """
    kind = pair_set(name)
    if tokenizer is None:
        raise InputError(f"the set {name} is made of texts and this model has no tokenizer; give pairs of token ids")
    if size is not None and size < 1:
        raise InputError(f"the set {name} of size {size}: give 1 or more")
    wanted = kind.default_size if size is None else size
    checked = CheckedPairs([])
    failed_in_a_row = 0
    for draft in _distinct(kind, seed):
        try:
            pair = _fitted(draft, tokenizer)
        except InputError as error:
            checked.dropped.append((str(draft.pair.clean), str(error)))
            failed_in_a_row += 1
            if failed_in_a_row == _PATIENCE:
                break
            continue
        failed_in_a_row = 0
        checked.pairs.append(replace(pair, name=f"{name} {len(checked.pairs)}: {draft.template}"))
        if len(checked.pairs) == wanted:
            return checked
    if size is None and checked.pairs:
        return checked
    why = f"; {checked.note()}" if checked.dropped else ""
    raise InputError(f"the set {name} has {len(checked.pairs)} pairs for this tokenizer and seed, not {wanted}{why}")


def _distinct(kind: PairSetKind, seed: int) -> Iterator[Draft]:
    """The set's drafts, each once."""
    seen: set[tuple[Any, ...]] = set()
    repeated = 0
    # A text seeds the generator the same way on every machine and in every version of Python.
    for draft in kind.drafts(Random(f"{kind.name} {seed}")):
        key = (draft.pair.clean, draft.pair.corrupt, draft.answers)
        repeated = repeated + 1 if key in seen else 0
        if repeated == _PATIENCE:
            return
        if not repeated:
            seen.add(key)
            yield draft


def _fitted(draft: Draft, tokenizer: Any) -> Pair:
    """The draft's pair with its answers as this tokenizer spells them; InputError says why where a check fails."""
    answer, distractor = _answers(draft, tokenizer)
    pair = replace(draft.pair, answer=answer, distractor=distractor)
    try:
        encoded = pair.encode(tokenizer)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{pair.label()}: ")) from None
    _check_lengths(draft, encoded)
    return pair


def _answers(draft: Draft, tokenizer: Any) -> tuple[str, str]:
    """The first spelling in which answer and distractor are one token each, and the one that follows the prompt."""
    first: InputError | None = None
    for answers in draft.answers:
        try:
            for what, text, prompt in zip(
                ("answer", "distractor"), answers, (draft.pair.clean, draft.pair.corrupt), strict=True
            ):
                _check_follows(tokenizer, str(prompt), text, draft.answers, what)
        except InputError as error:
            first = first or error
        else:
            return answers
    assert first is not None
    raise first


def _check_follows(tokenizer: Any, prompt: str, text: str, spellings: Any, what: str) -> None:
    token = single_token(tokenizer, text, what=what)
    before = encode(tokenizer, prompt, add_special_tokens=False).token_ids
    place = 0 if what == "answer" else 1
    # The text after the prompt always has its space, also where the token alone is written without.
    spaced = spellings[0][place] if spellings[0][place].strip() == text else text
    after = encode(tokenizer, prompt + spaced, add_special_tokens=False).token_ids
    if after != (*before, token):
        raise InputError(f"{what} {text!r} is not the one token that this tokenizer has after the prompt")


def _check_lengths(draft: Draft, encoded: EncodedPair) -> None:
    for side, prompt in (("clean", encoded.clean), ("corrupt", encoded.corrupt)):
        for slot in draft.single:
            positions = prompt.span(slot)
            if len(positions) != 1:
                word = "".join(prompt.token_texts[position] for position in positions)
                raise InputError(f"{slot} {word.strip()!r} is {len(positions)} tokens in the {side} prompt")
    if len(encoded.clean) != len(encoded.corrupt):
        raise InputError(f"the clean prompt has {len(encoded.clean)} tokens and the corrupt one {len(encoded.corrupt)}")
