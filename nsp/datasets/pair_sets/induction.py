"""Induction: words in an order without sense, begun again; the next word is the one that came next before.

The corrupt prompt has the answer and another word of the list in each other's place, so both are equally frequent and
equally far away in the two prompts, and only the order tells which comes next (Olsson et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from nsp.datasets.pair_sets.templates import Draft, PairSetKind, draft, listed, words_after_space

LENGTHS = (6, 8, 10)
WORDS = listed(
    "apple river stone window garden paper bridge candle horse mountain bottle silver winter market doctor engine "
    "forest letter ocean pencil planet rabbit school shadow summer table thunder tower valley village yellow music "
    "camera finger kitchen island button guitar hammer jacket lemon mirror orange pocket"
)


def drafts(random: Random) -> Iterator[Draft]:
    """Items of every length in turn; the list is begun again up to its middle."""
    while True:
        for length in LENGTHS:
            words = random.sample(WORDS, length)
            place = length // 2
            other = random.randrange(place + 1, length - 1)
            slots = {f"word{number}": word for number, word in enumerate(words)}
            text = "Words:" + "".join(f" {{{slot}}}" for slot in slots)
            again = {f"again{number}": word for number, word in enumerate(words[:place])}
            yield draft(
                f"{length} words",
                text + "".join(f" {{{slot}}}" for slot in again),
                slots | again,
                {f"word{place}": words[other], f"word{other}": words[place]},
                words_after_space(words[place], words[other]),
            )


KIND = PairSetKind("induction", "the next word of a list that is begun again", 50, drafts)
