"""Indirect object identification: the name that was mentioned once, not twice (Wang et al. 2022).

The corrupt prompt repeats the other name, so answer and distractor change places and everything else stays. Half of the
items name the indirect object first (ABBA), half second (BABA), so that order tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from nsp.datasets.pair_sets.templates import Draft, PairSetKind, draft, listed, words_after_space

TEMPLATES = (
    "When {a} and {b} went to the {place}, {s2} gave a {thing} to",
    "After {a} and {b} met at the {place}, {s2} handed a {thing} to",
    "While {a} and {b} were sitting in the {place}, {s2} passed a {thing} to",
    "Then {a} and {b} had a long talk at the {place}, and {s2} gave a {thing} to",
    "Last week {a} and {b} had a meeting at the {place}, and {s2} gave a {thing} to",
)
NAMES = listed(
    "Mary John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Paul "
    "Steven Andrew Kenneth George Kevin Brian Edward Jason Ryan Jacob Gary Nicholas Eric Stephen Justin Scott Frank "
    "Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Sandra Margaret Emily Michelle "
    "Carol Amanda Melissa Stephanie Laura Rebecca Sharon Amy Angela Anna Emma Rachel Peter Jack Henry Adam Simon Alice "
    "Jane Kate Helen Martin Alex Sam Tom Max Lucy Maria Julia Victoria"
)
PLACES = listed(
    "store park school office hospital library restaurant station garden house market beach museum bank church "
    "hotel farm"
)
THINGS = listed("drink ring book letter basket bone computer snack gift ball key map box card flower toy")


def drafts(random: Random) -> Iterator[Draft]:
    """Items of every template in turn, ABBA and BABA."""
    while True:
        for number, template in enumerate(TEMPLATES, start=1):
            for order in ("ABBA", "BABA"):
                io, subject = random.sample(NAMES, 2)
                first, second = ("{io}", "{s1}") if order == "ABBA" else ("{s1}", "{io}")
                words = {"io": io, "s1": subject, "s2": subject}
                yield draft(
                    f"{order} {number}",
                    template.replace("{a}", first).replace("{b}", second),
                    {**words, "place": random.choice(PLACES), "thing": random.choice(THINGS)},
                    {"s2": io},
                    words_after_space(io, subject),
                )


KIND = PairSetKind("ioi", "indirect object identification: the name that was mentioned only once", 50, drafts)
