"""Subject-verb agreement across a noun that stands between (Linzen et al. 2016).

The corrupt prompt has the subject in the other number. The noun between is the same in both and singular or plural by
chance, so that it tells nothing; half of the items have a plural answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from nsp.datasets.pair_sets.templates import Draft, PairSetKind, draft, listed, words_after_space

TEMPLATES = (
    "The {subject} near the {other}",
    "The {subject} behind the {other}",
    "The {subject} next to the {other}",
    "Everyone could see that the {subject} beside the {other}",
)
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
SUBJECTS = listed(
    "author student dog teacher doctor farmer manager pilot guard writer boy girl sister brother friend lawyer"
)
OTHERS = listed("door picture car table window house road tree building box")


def drafts(random: Random) -> Iterator[Draft]:
    """Items of every template in turn, with singular and plural subjects."""
    while True:
        for number, template in enumerate(TEMPLATES, start=1):
            for plural in (0, 1):
                one = random.choice(SUBJECTS)
                forms, verbs = (one, f"{one}s"), random.choice(VERBS)
                other = random.choice(OTHERS) + random.choice(("", "s"))
                yield draft(
                    f"{('singular', 'plural')[plural]} {number}",
                    template,
                    {"subject": forms[plural], "other": other.replace("boxs", "boxes")},
                    {"subject": forms[1 - plural]},
                    words_after_space(verbs[plural], verbs[1 - plural]),
                )


KIND = PairSetKind(
    "subject-verb-agreement", "the verb in the subject's number, across a noun that stands between", 50, drafts
)
