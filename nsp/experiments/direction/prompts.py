"""The prompts of a direction: encoded, their last positions named, divided into train, validation and test parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from nsp.datasets.prompts import Prompt
from nsp.errors import InputError
from nsp.experiments.direction.recipe import DirectionRecipe, SplitOptions
from nsp.experiments.prompt_options import ChatOptions, encode_prompts
from nsp.model import Model

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
SETS = ("positive", "negative")
SPAN = "template"
# Two texts that share no token, so that what their prompts share at the end is the template's.
_PROBES = ("7", "yes")


@dataclass(frozen=True)
class Divided:
    """Both sets of prompts, each with its last ``places`` positions as the span `SPAN`.

    Attributes:
        prompts: the positive set, then the negative one.
        which: the set of each prompt; ``part`` the part that it is in.
        place_texts: the tokens at those positions, empty where prompts differ in them.
    """

    prompts: tuple[Prompt, ...]
    which: tuple[str, ...]
    part: tuple[Part, ...]
    places: int
    place_texts: tuple[str, ...]

    def rows(self, part: Part, which: str | None = None) -> list[int]:
        """The numbers of the prompts in a part (of one set)."""
        both = zip(self.which, self.part, strict=True)
        return [row for row, (one, there) in enumerate(both) if there == part and which in (None, one)]

    def of(self, part: Part, which: str | None = None) -> tuple[Prompt, ...]:
        """The prompts in a part (of one set)."""
        return tuple(self.prompts[row] for row in self.rows(part, which))


def divided_prompts(model: Model, recipe: DirectionRecipe) -> Divided:
    """Encode both sets and divide them; InputError where a set is too small or a prompt too short."""
    given = {"positive": recipe.positive, "negative": recipe.negative}
    sets = {name: encode_prompts(model, given[name], recipe.chat) for name in SETS}
    places = template_length(model, recipe.chat) if recipe.positions == "template" else int(recipe.positions)
    everything = tuple(prompt for name in SETS for prompt in sets[name])
    short = min(everything, key=len)
    if len(short) < places:
        raise InputError(f"a prompt has {len(short)} tokens, and the last {places} positions are asked for ({short.title()})")
    ends = {prompt.token_ids[-places:] for prompt in everything}
    if recipe.positions == "template" and recipe.chat.template and len(ends) > 1:
        raise InputError("the prompts do not all end with the chat template's tokens; give positions as a number")
    texts = everything[0].token_texts[-places:] if len(ends) == 1 else ("",) * places
    which = tuple(name for name in SETS for _ in sets[name])
    parts = tuple(part for name in SETS for part in _parts(name, len(sets[name]), recipe.split, recipe.seed))
    return Divided(tuple(_with_span(prompt, places) for prompt in everything), which, parts, places, texts)


def template_length(model: Model, chat: ChatOptions) -> int:
    """How many tokens a prompt has after the instruction: the template's and the reply's beginning; at least one."""
    one, other = (prompt.token_ids for prompt in encode_prompts(model, _PROBES, chat))
    shared = 0
    while shared < min(len(one), len(other)) and one[-1 - shared] == other[-1 - shared]:
        shared += 1
    return max(1, shared)


def _with_span(prompt: Prompt, places: int) -> Prompt:
    return replace(prompt, spans=(*prompt.spans, (SPAN, tuple(range(len(prompt) - places, len(prompt))))))


def _parts(name: str, count: int, split: SplitOptions, seed: int) -> Sequence[Part]:
    """The part of each of ``count`` prompts; sets of one size are divided alike, so that pairs stay together."""
    train = max(1, round(split.train * count))
    validation = max(1, round(split.validation * count))
    if train + validation >= count:
        raise InputError(f"{name}: {count} prompts are too few for {train} to train, {validation} to choose and one to test on")
    parts: list[Part] = ["test"] * count
    for place, row in enumerate(np.random.default_rng(seed).permutation(count)):
        if place < train + validation:
            parts[row] = "train" if place < train else "validation"
    return parts
