"""Entities with facts about them: what a text must say to have named or described each.

A small set of well-known people, places and things that small models know, or a file of yours: a JSON object

    {"Paris": {"strong": ["capital of France"], "partial": ["France", "city"], "answer": "Capital of France",
               "answers": {"country": "France"}}}

``strong`` are facts that tell the entity from others, ``partial`` ones that many share. Patterns are phrases, found as
whole words whatever their case and accents; a ``*`` at a word's end stands for any letters ("physic*").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsp.errors import InputError

KINDS = ("people", "places", "things")


@dataclass(frozen=True)
class Entity:
    """One entity.

    Attributes:
        name: as a text names it; ``kind`` people, places, things, or empty.
        strong, partial: phrases that a text about it says.
        answer: a short description, whose log-probability is the score that needs no list; empty where there is none.
        answers: (question, answer) pairs for templates that ask one thing: its ``country``, or its name in French
            (``translate``).
    """

    name: str
    kind: str = ""
    strong: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    answer: str = ""
    answers: tuple[tuple[str, str], ...] = ()


# name: (country, French name); empty where English and French have one name, or where no country is its own.
_ANSWERS = {
    "Albert Einstein": ("Germany", ""), "Isaac Newton": ("England", ""), "Charles Darwin": ("England", ""),
    "William Shakespeare": ("England", ""), "Leonardo da Vinci": ("Italy", ""), "Wolfgang Amadeus Mozart": ("Austria", ""),
    "Abraham Lincoln": ("United States", ""), "George Washington": ("United States", ""), "Paris": ("France", ""),
    "London": ("England", "Londres"), "Tokyo": ("Japan", ""), "Rome": ("Italy", ""), "Egypt": ("", "Égypte"),
    "Brazil": ("", "Brésil"), "Australia": ("", "Australie"), "guitar": ("", "guitare"), "penguin": ("", "manchot"),
    "elephant": ("", "éléphant"), "oxygen": ("", "oxygène"), "gold": ("", "or"), "volcano": ("", "volcan"),
    "telescope": ("", "télescope"),
}  # fmt: skip


def _answers(name: str) -> tuple[tuple[str, str], ...]:
    known = zip(("country", "translate"), _ANSWERS.get(name, ("", "")), strict=True)
    return tuple((question, answer) for question, answer in known if answer)


def _entities(kind: str, rows: Iterable[tuple[str, str, str, str]]) -> list[Entity]:
    return [
        Entity(name, kind, tuple(strong.split("; ")), tuple(partial.split("; ")), answer, _answers(name))
        for name, answer, strong, partial in rows
    ]


_PEOPLE = _entities("people", [
    ("Albert Einstein", "German physicist",
     "physicist; relativity; theoretical physic*",
     "scientist; german*; physic*; nobel"),
    ("Isaac Newton", "English physicist and mathematician",
     "gravity; laws of motion; physicist; mathematician",
     "scientist; english; british; calculus; physic*"),
    ("Charles Darwin", "English naturalist",
     "evolution*; natural selection; naturalist; origin of species",
     "scientist; biologist; english; british; species"),
    ("William Shakespeare", "English playwright and poet",
     "playwright; hamlet; romeo; macbeth; poet",
     "writer; author; english; plays; british"),
    ("Leonardo da Vinci", "Italian painter",
     "mona lisa; last supper; italian*; renaissance",
     "painter; artist; inventor; engineer"),
    ("Wolfgang Amadeus Mozart", "Austrian composer",
     "composer; austria*; requiem; magic flute",
     "music*; opera; pianist; symphon*"),
    ("Abraham Lincoln", "President of the United States",
     "16th president; civil war; emancipation; president",
     "american; politician; united states; leader"),
    ("George Washington", "First President of the United States",
     "first president; 1st president; revolution*; president",
     "american; politician; general; united states"),
])  # fmt: skip
_PLACES = _entities("places", [
    ("Paris", "Capital of France",
     "capital of france; capital city of france; eiffel; french capital",
     "france; french; city; capital"),
    ("London", "Capital of England",
     "capital of england; capital of the united kingdom; thames; capital of the uk; british capital",
     "england; uk; united kingdom; british; city; capital"),
    ("Tokyo", "Capital of Japan", "capital of japan; capital city of japan; japan*", "city; capital; asia*"),
    ("Rome", "Capital of Italy",
     "capital of italy; capital city of italy; colosseum; roman*; ital*",
     "city; capital; empire; europe*"),
    ("Egypt", "Country in Africa",
     "pyramid*; nile; pharaoh*; cairo",
     "africa*; country; desert; middle east; ancient"),
    ("Brazil", "Country in South America",
     "south america*; amazon; portuguese; rio de janeiro",
     "country; latin; soccer; football"),
    ("Australia", "Country in Oceania",
     "sydney; kangaroo*; oceania; canberra; aborigin*",
     "country; continent; island; pacific"),
    ("Mars", "Planet in the Solar System", "red planet; fourth planet; planet", "solar system; space; sun; rover"),
])  # fmt: skip
_THINGS = _entities("things", [
    ("piano", "Musical instrument with keys", "musical instrument; keyboard; keys", "music*; instrument; play*"),
    ("guitar", "Musical instrument with strings",
     "musical instrument; stringed; strings; string instrument",
     "music*; instrument; play*"),
    ("penguin", "Flightless bird", "flightless; bird; antarctic*", "animal; species; sea; cold"),
    ("elephant", "Large animal with a trunk",
     "trunk; largest land; tusk*; mammal",
     "animal; africa*; large; species"),
    ("oxygen", "Chemical element", "element; gas; symbol o", "air; breath*; chemical; molecule"),
    ("gold", "Precious metal", "precious metal; metal; symbol au", "yellow; element; jewel*; mineral"),
    ("volcano", "Mountain that erupts", "erupt*; lava; magma; molten", "mountain; rock*; crater; earth"),
    ("telescope", "Instrument for seeing distant objects",
     "astronom*; distant objects; stars; optical",
     "instrument; lens*; observ*; space"),
])  # fmt: skip

ENTITIES: dict[str, Entity] = {entity.name: entity for entity in [*_PEOPLE, *_PLACES, *_THINGS]}
"""The built-in entities by name."""


def entities(which: str | Iterable[str]) -> tuple[Entity, ...]:
    """Built-in entities: ``all``, a kind (``people``, ``places``, ``things``), or a list of kinds and names."""
    wanted = [which] if isinstance(which, str) else list(which)
    chosen: dict[str, Entity] = {}
    for name in wanted:
        if name == "all":
            chosen |= ENTITIES
        elif name in KINDS:
            chosen |= {entity.name: entity for entity in ENTITIES.values() if entity.kind == name}
        elif name in ENTITIES:
            chosen[name] = ENTITIES[name]
        else:
            raise InputError(
                f"no built-in entity or kind {name!r}; kinds: {', '.join(KINDS)}, or all; entities: {', '.join(ENTITIES)}"
            )
    return tuple(chosen.values())


def read_entities(path: str | Path) -> dict[str, Entity]:
    """Entities by name from a JSON file (see above). InputError names the entity and the key that is wrong."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read entities from {path}: {error}") from None
    if not isinstance(data, dict) or not data:
        raise InputError(f"{path}: expected an object: entity -> {{strong: [...], partial: [...]}}")
    return {str(name): _entity(str(path), str(name), item) for name, item in data.items()}


def _entity(path: str, name: str, item: Any) -> Entity:
    keys = ("kind", "strong", "partial", "answer", "answers")
    if not isinstance(item, Mapping) or not set(item) <= set(keys):
        raise InputError(f"{path}: {name!r} is {item!r}; expected an object with {', '.join(keys)}")
    lists = {key: item.get(key, []) for key in ("strong", "partial")}
    for key, phrases in lists.items():
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
            raise InputError(f"{path}: {name!r}: {key} is {phrases!r}; expected a list of phrases")
    texts = {key: item.get(key, "") for key in ("kind", "answer")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"{path}: {name!r}: {key} is {text!r}; expected a text")
    answers = item.get("answers", {})
    if not isinstance(answers, Mapping) or not all(isinstance(text, str) and text for text in answers.values()):
        raise InputError(f"{path}: {name!r}: answers is {answers!r}; expected an object: question -> text")
    if not lists["strong"] and not lists["partial"] and not texts["answer"] and not answers:
        raise InputError(f"{path}: {name!r} has no strong or partial phrase and no answer: nothing could match")
    phrases = tuple(lists["strong"]), tuple(lists["partial"])
    return Entity(name, texts["kind"], *phrases, texts["answer"], tuple(answers.items()))
