"""Facts for causal tracing: a prompt that names a subject, and the one token that completes it.

The sentences were written for nsp and are under its licence. Each is common knowledge; each depends on the subject
(no prompt ends on a first name that only one answer follows), and smollm2 gives every answer as its most likely next
token. Another model may not know them all: `nsp.experiments.causal_tracing` leaves out what a model does not know, and
says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nsp.datasets.prompts import Prompt, encode
from nsp.datasets.table_files import read_rows
from nsp.datasets.tokens import single_token
from nsp.errors import InputError

_COLUMNS = ("prompt", "subject", "answer")


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        prompt: text up to the answer.
        subject: the piece of the prompt, occurring once, that names what the fact is about.
        answer: the next token, with its leading space.
        origin: where it was read ("facts.csv:12"), for messages.
    """

    prompt: str
    subject: str
    answer: str
    origin: str = field(default="", compare=False, repr=False)

    def label(self) -> str:
        """The fact's origin, or the beginning of its prompt, for messages."""
        return self.origin or f"fact {self.prompt!r:.50}"


@dataclass(frozen=True)
class EncodedFact:
    """A fact as one model reads it: ``prompt`` has the span ``subject``."""

    fact: Fact
    prompt: Prompt
    answer: int


def encode_fact(tokenizer: Any, fact: Fact) -> EncodedFact:
    """Tokenise a fact. InputError, which names it, where the subject is not there once or the answer is not one token."""
    try:
        prompt = encode(tokenizer, fact.prompt, spans={"subject": fact.subject})
        return EncodedFact(fact, prompt, single_token(tokenizer, fact.answer, what="answer"))
    except InputError as error:
        raise InputError(f"{fact.label()}: {error}") from None


def read_facts(path: str) -> list[Fact]:
    """Facts from a csv, tsv, json or jsonl file with the columns prompt, subject, answer."""
    facts = []
    for row in read_rows(path):
        values = [row.values.get(name) for name in _COLUMNS]
        for name, value in zip(_COLUMNS, values, strict=True):
            if not isinstance(value, str) or not value:
                raise InputError(f"{row.where}: {name} is {value!r}; a fact has text in the columns {', '.join(_COLUMNS)}")
        prompt, subject, answer = map(str, values)
        facts.append(Fact(prompt, subject, answer, row.where))
    return facts


def roles(prompt: Prompt) -> Sequence[str]:
    """What each position of a fact is to it, one of `ROLES` (empty before the subject).

    A subject of one token is its last token; a token that is first after the subject and last of all is ``last``.
    """
    subject = prompt.span("subject")
    names = []
    for position in range(len(prompt)):
        if position == len(prompt) - 1:
            names.append("last")
        elif position < subject[0]:
            names.append("")
        elif position == subject[-1]:
            names.append("subject_last")
        elif position == subject[0]:
            names.append("subject_first")
        elif position < subject[-1]:
            names.append("subject_middle")
        else:
            names.append("after_first" if position == subject[-1] + 1 else "after_rest")
    return names


ROLES: dict[str, str] = {
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "after_first": "first token after it",
    "after_rest": "further tokens",
    "last": "last token",
}
"""The roles of positions in a fact, in the order of a prompt, as in Meng et al. 2022, figure 1."""


def _located(kind: str, **answers: str) -> list[Fact]:
    """Facts of one form; underscores in a name stand for spaces."""
    return [
        Fact(kind.format(subject=name.replace("_", " ")), name.replace("_", " "), f" {answer}")
        for name, answer in answers.items()
    ]


FACTS: tuple[Fact, ...] = (
    *_located(
        "The {subject} is located in the city of",
        Eiffel_Tower="Paris", Colosseum="Rome", Acropolis="Athens", Brandenburg_Gate="Berlin", Kremlin="Moscow",
        Louvre_Museum="Paris",
    ),
    *_located(
        "The {subject} is located in the country of",
        Taj_Mahal="India", Great_Wall="China", Great_Pyramid_of_Giza="Egypt",
    ),
    *_located("{subject} is located in the country of", Machu_Picchu="Peru", Mount_Fuji="Japan"),
    *_located(
        "{subject} was born in the country of",
        Johann_Sebastian_Bach="Germany", Wolfgang_Amadeus_Mozart="Austria", Mahatma_Gandhi="India",
        Pablo_Picasso="Spain", Leonardo_da_Vinci="Italy",
    ),
    *_located(
        "The native language of {subject} was",
        Napoleon_Bonaparte="French", Miguel_de_Cervantes="Spanish", Johann_Wolfgang_von_Goethe="German",
        Leo_Tolstoy="Russian", Dante_Alighieri="Italian",
    ),
    *_located(
        "The city of {subject} is located in the country of",
        Barcelona="Spain", Kyoto="Japan", Mumbai="India", Istanbul="Turkey", Toronto="Canada", Melbourne="Australia",
    ),
    *_located(
        "The capital of {subject} is",
        France="Paris", Germany="Berlin", Greece="Athens", Japan="Tokyo", Russia="Moscow", Spain="Madrid",
    ),
    Fact("The capital of the United Kingdom is", "United Kingdom", " London"),
    Fact("The capital of South Korea is the city of", "South Korea", " Seoul"),
    *_located("The {subject} is located in the state of", Alamo="Texas", Grand_Canyon="Arizona"),
    Fact("Disneyland is located in the state of", "Disneyland", " California"),
    Fact("The novel Oliver Twist was written by Charles", "Oliver Twist", " Dickens"),
    Fact(
        "The theory of evolution by natural selection was proposed by Charles",
        "theory of evolution by natural selection",
        " Darwin",
    ),
    Fact("The operating system Windows was developed by the company", "operating system Windows", " Microsoft"),
    Fact("The iPhone was developed by the company", "iPhone", " Apple"),
    Fact("The Sahara Desert is located on the continent of", "Sahara Desert", " Africa"),
    Fact("The River Thames flows through the city of", "River Thames", " London"),
    Fact("The Berlin Wall was located in the country of", "Berlin Wall", " Germany"),
    Fact("The Olympic Games were first held in the country of", "Olympic Games", " Greece"),
    Fact("The sport associated with Michael Jordan is", "Michael Jordan", " basketball"),
)  # fmt: skip
"""The facts that ship with nsp."""
