"""Greater than: a span of years ends later than it begins (Hanna et al. 2023).

The clean prompt begins in the middle of a century: the answer is a later year, the distractor an earlier one. The
corrupt prompt begins early in the century, where *both* are possible: the answer is less preferred there, not wrong.
Tokenizers that split numbers into digits answer with the decade's digit, others with two digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from nsp.datasets.pair_sets.templates import Draft, PairSetKind, draft, listed

TEMPLATES = (
    "The {event} lasted from the year {start} to the year {century}",
    "The {event} began in {start} and ended in {century}",
    "The {event} started in the year {start} and went on until the year {century}",
)
EVENTS = listed(
    "war project trial campaign conflict construction journey expedition mission strike "
    "study tour alliance dynasty empire reign siege rebellion"
)
CENTURIES = range(14, 20)


def drafts(random: Random) -> Iterator[Draft]:
    """Items of every template in turn."""
    while True:
        for number, template in enumerate(TEMPLATES, start=1):
            century, decade = random.choice(CENTURIES), random.randint(4, 6)
            end, before = random.randint(decade + 1, 9), random.randint(2, decade - 1)
            year, last, first = (random.randint(1, 9) for _ in range(3))
            start, early = f"{century}{decade}{year}", f"{century}0{year}"
            yield draft(
                f"template {number}",
                template,
                {"event": random.choice(EVENTS), "start": start, "century": str(century)},
                {"start": early},
                ((f"{end}{last}", f"{before}{first}"), (str(end), str(before))),
                single=("event",),
            )


KIND = PairSetKind("greater-than", "a year after the year that was named, against one before it", 50, drafts)
