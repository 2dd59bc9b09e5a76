"""Docstrings: the parameter that a function's documentation describes next (Heimersheim and Janiak 2023).

The documentation has described the first two parameters. The corrupt prompt has the third and the fourth in each
other's place in the function's head, so answer and distractor change places and the words are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from nsp.datasets.pair_sets.templates import Draft, PairSetKind, draft, listed, words_after_space

HEAD = "def {name}(self, {first}, {second}, {third}, {fourth}{more}):\n"
BODY = '    """{about} {what}\n\n    :param {first_again}: {words1}\n    :param {second_again}: {words2}\n    :param'
NAMES = listed("port load make find read write send draw open move check build")
PARAMETERS = listed(
    "size files last unit column value index name path key line text user node data state time page count length "
    "width height color image group level number option order parent child table row field word title label model "
    "query result score message client server item list"
)
NOUNS = listed(
    "oil crime piece song river window bread winter stone horse paper bridge market letter forest ocean "
    "planet summer music"
)


def drafts(random: Random) -> Iterator[Draft]:
    """Items with four and with five parameters."""
    while True:
        for more in (0, 1):
            names = random.sample(PARAMETERS, 4 + more)
            nouns = random.sample(NOUNS, 6)
            words = dict(zip(("first", "second", "third", "fourth", "fifth"), names, strict=False))
            words |= {"first_again": names[0], "second_again": names[1], "name": random.choice(NAMES)}
            about = {"about": nouns[0], "what": nouns[1]}
            about |= {"noun1": nouns[2], "noun2": nouns[3], "noun3": nouns[4], "noun4": nouns[5]}
            text = HEAD.replace("{more}", ", {fifth}" * more) + BODY
            text = text.replace("{words1}", "{noun1} {noun2}").replace("{words2}", "{noun3} {noun4}")
            yield draft(
                f"{4 + more} parameters",
                text,
                words | about,
                {"third": names[3], "fourth": names[2]},
                words_after_space(names[2], names[3]),
                single=tuple(slot for slot in (words | about) if slot != "name"),
            )


KIND = PairSetKind("docstring", "the next parameter of a function's documentation", 50, drafts)
