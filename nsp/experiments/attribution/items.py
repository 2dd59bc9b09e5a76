"""From a recipe's prompts to what is attributed: encoded prompts, target tokens, counterfactual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nsp.datasets.prompts import Prompt
from nsp.datasets.tokens import check_token_ids, single_token, token_texts
from nsp.engine.readout import build_readout
from nsp.engine.recording import record
from nsp.errors import InputError
from nsp.experiments.attribution.recipe import (
    NONE,
    RUNNER_UP,
    AttributedPrompt,
    AttributionRecipe,
    FactSet,
    PromptTable,
)
from nsp.experiments.prompt_options import ChatOptions, encode_prompts
from nsp.model import Model
from nsp.sites import Selection


@dataclass(frozen=True)
class Item:
    """One attributed prompt.

    Attributes:
        tokens: the target, and the counterfactual token where there is one.
        position: where the next-token distribution is measured; ``rank`` of the target there (0: most likely).
        donor: the counterfactual prompt.
    """

    name: str
    prompt: Prompt
    tokens: tuple[int, ...]
    position: int
    rank: int
    donor: Prompt | None = None


@dataclass(frozen=True)
class _Wanted:
    """An item before the model has been asked: tokens None where its own prediction is taken."""

    name: str
    prompt: Prompt
    donor: Prompt | None
    target: int | None
    counterfactual: int | str  # a token id, runner-up or none
    position: int


@dataclass(frozen=True)
class Items:
    """The items; those of a built-in set that were left out: (prompt, why); and all prompts there are, beyond ``size`` too."""

    items: tuple[Item, ...]
    left_out: tuple[tuple[str, str], ...]
    every: tuple[Prompt, ...]


def attributed_items(model: Model, recipe: AttributionRecipe) -> Items:
    """The items of a recipe for a model; runs one ordinary pass to know its predictions. InputError names what is wrong."""
    given, chat = _listed(recipe)
    wanted: list[_Wanted] = []
    for number, item in enumerate(given):
        name = item.name or f"prompt {number}"
        try:
            wanted += _wanted(model, recipe, item, name, chat)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    items = _asked(model, wanted)
    if not (isinstance(recipe.prompts, FactSet) and recipe.known):
        chosen = _first(items, recipe.prompts, "") if isinstance(recipe.prompts, FactSet) else items
        return Items(tuple(chosen), (), tuple(item.prompt for item in items))
    known = [item for item in items if item.rank == 0]
    left = tuple(
        (item.name, f"the model gives another token; the answer has rank {item.rank}") for item in items if item.rank
    )
    if not known:
        raise InputError(
            f"{model.name} answers no question of the set {recipe.prompts.set!r} rightly; give prompts of your own"
        )
    chosen = _first(known, recipe.prompts, f" that {model.name} answers rightly")
    return Items(tuple(chosen), left, tuple(item.prompt for item in known))


def _first(items: Sequence[Item], given: FactSet, which: str) -> Sequence[Item]:
    """The first so many of a built-in set. InputError where more are asked for than there are."""
    if given.size is not None and given.size > len(items):
        raise InputError(f"prompts.size: the set {given.set!r} has {len(items)} prompts{which}, not {given.size}")
    return items[: given.size]


def _listed(recipe: AttributionRecipe) -> tuple[Sequence[AttributedPrompt], ChatOptions | None]:
    prompts = recipe.prompts
    if isinstance(prompts, PromptTable):
        return prompts.read(), recipe.chat
    if not isinstance(prompts, FactSet):
        return prompts, recipe.chat
    if prompts.set == "facts":
        from nsp.datasets.facts import FACTS

        return [
            AttributedPrompt(prompt=fact.prompt, answer=fact.answer, name=fact.prompt) for fact in FACTS
        ], recipe.chat
    from nsp.datasets.fact_questions import FACT_QUESTIONS, RESPONSE

    chat = recipe.chat or ChatOptions(template=True, response=RESPONSE)
    return [AttributedPrompt(prompt=one.question, answer=one.answer, name=one.question) for one in FACT_QUESTIONS], chat


def _wanted(
    model: Model, recipe: AttributionRecipe, item: AttributedPrompt, name: str, chat: ChatOptions | None
) -> list[_Wanted]:
    prompt = encode_prompts(model, (item.prompt,), chat)[0]
    donor = None if item.donor is None else encode_prompts(model, (item.donor,), chat)[0]
    position = _position(prompt, recipe.position)
    against: int | str = recipe.counterfactual if item.distractor is None else item.distractor
    if item.answer is None:
        if recipe.target != "single":
            raise InputError(f"target: {recipe.target} is about an answer of several tokens; this prompt names none")
        other = against if against in (RUNNER_UP, NONE) else single_token(model.tokenizer, against, what="distractor")
        return [_Wanted(name, prompt, donor, None, other, position)]
    targets = _pieces(model, item.answer, "answer", recipe.target)
    others: Sequence[int | str]
    others = (
        [against] * len(targets)
        if against in (RUNNER_UP, NONE)
        else _pieces(model, against, "distractor", recipe.target)
    )
    if recipe.target != "all":
        before = targets[:-1] if recipe.target == "last" else ()
        end = -1 if recipe.target == "last" else 0
        return [_extended(_Wanted(name, prompt, donor, targets[end], others[end], position), before, model)]
    if len(others) != len(targets):
        raise InputError(
            f"target: all needs answer and distractor of equally many tokens, not {len(targets)} and {len(others)}"
        )
    found = []
    for number, (target, other) in enumerate(zip(targets, others, strict=True)):
        label = f"{name} [{number + 1}/{len(targets)}]" if len(targets) > 1 else name
        found.append(_extended(_Wanted(label, prompt, donor, target, other, position), targets[:number], model))
    return found


def _position(prompt: Prompt, selection: str) -> int:
    places = prompt.positions(Selection.of(selection))
    if len(places) != 1:
        raise InputError(f"position: {selection} selects {len(places)} positions; a metric reads one")
    return places[0]


def _pieces(model: Model, text: int | str, what: str, how: str) -> tuple[int, ...]:
    """The tokens of an answer; several are an error unless ``how`` says which."""
    if how == "single" or isinstance(text, int):
        try:
            return (single_token(model.tokenizer, text, what=what),)
        except InputError as error:
            if isinstance(text, str) and "tokens:" in str(error):
                raise InputError(f"{error}; or choose target: first, last or all") from None
            raise
    found = tuple(int(token) for token in model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not found:
        raise InputError(f"the {what} {text!r} holds no token")
    return found


def _extended(item: _Wanted, before: Sequence[int], model: Model) -> _Wanted:
    """The item with the answer's earlier tokens read already."""
    if not before:
        return item
    if item.position != len(item.prompt) - 1:
        raise InputError("an answer of several tokens is measured at the last position")

    def longer(prompt: Prompt) -> Prompt:
        return model.encode([*prompt.token_ids, *before])

    prompt = longer(item.prompt)
    donor = None if item.donor is None else longer(item.donor)
    return replace(item, prompt=prompt, donor=donor, position=len(prompt) - 1)


def _asked(model: Model, wanted: Sequence[_Wanted]) -> list[Item]:
    """The items with the model's own predictions filled in."""
    runtime = model.runtime
    bases = torch.arange(len(wanted))
    columns = torch.tensor([item.position for item in wanted])
    readout = build_readout(runtime, [], bases, [bases], [columns], logits=True)
    logits = record(runtime, [item.prompt.token_ids for item in wanted], (), readout=readout).logits
    assert logits is not None
    size = logits.shape[1]
    items = []
    for row, item in zip(logits.float().cpu(), wanted, strict=True):
        order = torch.topk(row, 2).indices.tolist()
        target = order[0] if item.target is None else check_token_ids([item.target], "answer")[0]
        if item.counterfactual == RUNNER_UP:
            tokens: tuple[int, ...] = (target, next(token for token in order if token != target))
        elif item.counterfactual == NONE:
            tokens = (target,)
        else:
            tokens = (target, check_token_ids([item.counterfactual], "distractor")[0])
        if max(tokens) >= size:
            raise InputError(f"{item.name}: token id {max(tokens)} is not in the model's vocabulary (0 to {size - 1})")
        if len(set(tokens)) < len(tokens):
            raise InputError(f"{item.name}: target and counterfactual token are the same")
        rank = int((row > row[target]).sum())
        items.append(Item(item.name, item.prompt, tokens, item.position, rank, item.donor))
    return items


def token_text(model: Model, token: int) -> str:
    """A token's text for people."""
    return token_texts(model.tokenizer, [token])[0]


def metric_kind(recipe: AttributionRecipe, items: Sequence[Item]) -> str:
    """What is attributed: a difference of logits, or what the recipe measures of the target alone."""
    counts = {len(item.tokens) for item in items}
    if len(counts) > 1:
        raise InputError(
            "either every prompt has a counterfactual token or none has; distractors are given for some only"
        )
    return "logit_diff" if counts == {2} else recipe.measure


def donor_prompt(item: Item) -> Prompt:
    """The counterfactual prompt of an item. InputError where it has none."""
    if item.donor is None:
        raise InputError(f"{item.name}: donor: counterfactual needs a counterfactual prompt (donor: …)")
    return item.donor


def chosen_text(model: Model, item: Item, number: int) -> Any:
    """The text of an item's target (0) or counterfactual token (1), empty where there is none."""
    return token_text(model, item.tokens[number]) if len(item.tokens) > number else ""
