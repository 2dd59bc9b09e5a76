"""Questions with one-token answers, for chat models: what a circuit of factual recall is found on.

Written for nsp, under its licence. With its chat template and the reply begun as ``Answer:``, smollm2 gives every answer as its
most likely next token. Statements to complete are in `nsp.datasets.facts`.
"""

from __future__ import annotations

from dataclasses import dataclass

RESPONSE = "Answer:"


@dataclass(frozen=True)
class FactQuestion:
    """A question and the token that follows ``Answer:``, with its leading space."""

    question: str
    answer: str


def _capitals(**capitals: str) -> tuple[FactQuestion, ...]:
    """Capitals by country or state; underscores in a name stand for spaces."""
    return tuple(
        FactQuestion(f"What is the capital of {place.replace('_', ' ')}?", f" {city}")
        for place, city in capitals.items()
    )


FACT_QUESTIONS: tuple[FactQuestion, ...] = (
    *_capitals(
        Texas="Austin", France="Paris", Germany="Berlin", Greece="Athens", Japan="Tokyo", Russia="Moscow", Austria="Vienna",
        Hungary="Budapest", Norway="Oslo", Sweden="Stockholm", Denmark="Copenhagen", Ireland="Dublin", Scotland="Edinburgh",
        Iran="Tehran", Cuba="Havana", Chile="Santiago", Kenya="Nairobi", Massachusetts="Boston", Colorado="Denver",
        Hawaii="Honolulu", the_Netherlands="Amsterdam", South_Korea="Seoul", the_United_States="Washington",
    ),
    FactQuestion("What language is spoken in Mexico?", " Spanish"),
    FactQuestion("What planet is known as the Red Planet?", " Mars"),
    FactQuestion("In which country is the Eiffel Tower?", " France"),
)  # fmt: skip
"""The questions that ship with nsp."""
