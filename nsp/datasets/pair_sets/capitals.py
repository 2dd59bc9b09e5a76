"""Capitals: a fact that is looked up by the country's name. The corrupt prompt names another country."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from nsp.datasets.pair_sets.templates import Draft, PairSetKind, draft, words_after_space

TEMPLATES = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "The name of the capital of {country} is",
    "We flew to the capital of {country}, the city of",
    "Everyone knows that the capital of {country} is",
)
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Poland": "Warsaw", "Sweden": "Stockholm",
    "Norway": "Oslo", "Denmark": "Copenhagen", "Finland": "Helsinki", "Ireland": "Dublin", "Portugal": "Lisbon",
    "Austria": "Vienna", "Hungary": "Budapest", "Cuba": "Havana", "Canada": "Ottawa", "Peru": "Lima",
    "Chile": "Santiago", "Iran": "Tehran", "Iraq": "Baghdad", "India": "Delhi", "Kenya": "Nairobi",
    "Belgium": "Brussels", "England": "London", "Scotland": "Edinburgh", "Bulgaria": "Sofia",
    "Syria": "Damascus", "Afghanistan": "Kabul", "Australia": "Canberra",
}  # fmt: skip


def drafts(random: Random) -> Iterator[Draft]:
    """Items of every template in turn."""
    while True:
        for number, template in enumerate(TEMPLATES, start=1):
            country, other = random.sample(sorted(CAPITALS), 2)
            answers = words_after_space(CAPITALS[country], CAPITALS[other])
            yield draft(f"template {number}", template, {"country": country}, {"country": other}, answers)


KIND = PairSetKind("capitals", "the capital of a country, against that of another country", 50, drafts)
