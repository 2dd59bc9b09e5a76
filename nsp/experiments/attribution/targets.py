"""From a recipe's prompts to what is attributed: encoded prompts, their target tokens and counterfactual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nsp.datasets.prompts import Prompt
from nsp.datasets.tokens import check_token_ids, single_token, token_texts
from nsp.engine.readout import build_readout
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
class Target:
    """What is attributed of one prompt.

    Attributes:
        tokens: ids of the target token, and of the counterfactual token where there is one.
        position: where the next-token distribution is measured; ``rank`` of the target there (0: most likely).
        donor: the counterfactual prompt.
    """

    name: str
    prompt: Prompt
    tokens: tuple[int, ...]
    position: int
    rank: int
    donor: Prompt | None = None

    def text(self, model: Model, number: int) -> str:
        """The text of the target (0) or of the counterfactual token (1), empty where there is none."""
        return token_texts(model.tokenizer, [self.tokens[number]])[0] if len(self.tokens) > number else ""

    @property
    def donor_prompt(self) -> Prompt:
        """The counterfactual prompt. InputError where there is none."""
        if self.donor is None:
            raise InputError(f"{self.name}: donor: counterfactual needs a counterfactual prompt (donor: …)")
        return self.donor


@dataclass(frozen=True)
class Targets:
    """The targets of a run.

    Attributes:
        left_out: prompts of a built-in set that are left out, each with the reason.
        every: all prompts that could be attributed, beyond a built-in set's ``size`` too.
    """

    targets: tuple[Target, ...]
    left_out: tuple[tuple[str, str], ...]
    every: tuple[Prompt, ...]


@dataclass(frozen=True)
class _Wanted:
    """A target before the model has been asked: None where its own prediction is taken."""

    name: str
    prompt: Prompt
    donor: Prompt | None
    target: int | None
    counterfactual: int | str  # a token id, runner-up or none
    position: int


def attribution_targets(model: Model, recipe: AttributionRecipe) -> Targets:
    """The targets of a recipe for a model; runs one ordinary pass to know its predictions.

    Raises:
        InputError: names the prompt that is wrong, and what is wrong with it.
    """
    prompts, chat = _listed(recipe)
    wanted: list[_Wanted] = []
    for number, prompt in enumerate(prompts):
        name = prompt.name or f"prompt {number}"
        try:
            wanted += _wanted(model, recipe, prompt, name, chat)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    targets = _asked(model, wanted)
    given, known = recipe.prompts, recipe.known
    if not isinstance(given, FactSet):
        return Targets(tuple(targets), (), tuple(target.prompt for target in targets))
    usable = [target for target in targets if target.rank == 0 or not known]
    if not usable:
        raise InputError(f"{model.name} answers no question of the set {given.set!r} rightly; give prompts of your own")
    if given.size is not None and given.size > len(usable):
        which = f" that {model.name} answers rightly" if known else ""
        raise InputError(f"prompts.size: the set {given.set!r} has {len(usable)} prompts{which}, not {given.size}")
    wrong = [target for target in targets if target.rank and known]
    left_out = ((target.name, f"the model gives another token; the answer has rank {target.rank}") for target in wrong)
    return Targets(tuple(usable[: given.size]), tuple(left_out), tuple(target.prompt for target in usable))


def metric_kind(recipe: AttributionRecipe, targets: Sequence[Target]) -> str:
    """What is attributed: a difference of logits, or what the recipe measures of the target alone."""
    counts = {len(target.tokens) for target in targets}
    if len(counts) > 1:
        raise InputError(
            "either every prompt has a counterfactual token or none has; distractors are given for some only"
        )
    return "logit_diff" if counts == {2} else recipe.measure


def _listed(recipe: AttributionRecipe) -> tuple[Sequence[AttributedPrompt], ChatOptions | None]:
    """The prompts one by one, and how they become the model's."""
    prompts, chat = recipe.prompts, recipe.chat
    if isinstance(prompts, PromptTable):
        return prompts.read(), chat
    if not isinstance(prompts, FactSet):
        return prompts, chat
    if prompts.set == "facts":
        from nsp.datasets.facts import FACTS

        texts = [(fact.prompt, fact.answer) for fact in FACTS]
    else:
        from nsp.datasets.fact_questions import FACT_QUESTIONS, RESPONSE

        texts = [(fact.question, fact.answer) for fact in FACT_QUESTIONS]
        chat = chat or ChatOptions(template=True, response=RESPONSE)
    return [AttributedPrompt(prompt=text, answer=answer, name=text) for text, answer in texts], chat


def _wanted(
    model: Model, recipe: AttributionRecipe, given: AttributedPrompt, name: str, chat: ChatOptions | None
) -> list[_Wanted]:
    """What is wanted of one prompt of the recipe: one target, or with ``target: all`` one for each token of the answer."""
    (prompt,) = encode_prompts(model, (given.prompt,), chat)
    donor = None if given.donor is None else encode_prompts(model, (given.donor,), chat)[0]
    places = prompt.positions(Selection.of(recipe.position))
    if len(places) != 1:
        raise InputError(f"position: {recipe.position} selects {len(places)} positions; a metric reads one")
    answer = recipe.answer if given.answer is None else given.answer
    against = recipe.counterfactual if given.distractor is None else given.distractor
    none_given = against in (RUNNER_UP, NONE)
    if answer is None:
        if recipe.target != "single":
            raise InputError(f"target: {recipe.target} is about an answer of several tokens; this prompt names none")
        other = against if none_given else single_token(model.tokenizer, against, what="distractor")
        return [_Wanted(name, prompt, donor, None, other, places[0])]
    targets = _tokens(model, answer, "answer", recipe.target)
    others: Sequence[int | str] = [against] * len(targets)
    if not none_given:
        others = _tokens(model, against, "distractor", recipe.target)
    first = _Wanted(name, prompt, donor, targets[0], others[0], places[0])
    if recipe.target == "last":
        return [_after(replace(first, target=targets[-1], counterfactual=others[-1]), targets[:-1], model)]
    if recipe.target != "all":
        return [first]
    if len(others) != len(targets):
        raise InputError(
            f"target: all needs answer and distractor of equally many tokens, not {len(targets)} and {len(others)}"
        )
    wanted = []
    for number, (target, other) in enumerate(zip(targets, others, strict=True)):
        label = f"{name} [{number + 1}/{len(targets)}]" if len(targets) > 1 else name
        one_token = replace(first, name=label, target=target, counterfactual=other)
        wanted.append(_after(one_token, targets[:number], model))
    return wanted


def _tokens(model: Model, text: int | str, what: str, which: str) -> tuple[int, ...]:
    """The tokens of an answer; several are an error unless ``which`` says which are taken."""
    if which == "single" or isinstance(text, int):
        try:
            return (single_token(model.tokenizer, text, what=what),)
        except InputError as error:
            if isinstance(text, str) and "tokens:" in str(error):
                raise InputError(f"{error}; or choose target: first, last or all") from None
            raise
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"the {what} {text!r} holds no token")
    return tuple(map(int, ids))


def _after(wanted: _Wanted, before: Sequence[int], model: Model) -> _Wanted:
    """The same with the answer's earlier tokens read already."""
    if not before:
        return wanted
    if wanted.position != len(wanted.prompt) - 1:
        raise InputError("an answer of several tokens is measured at the last position")
    prompt = model.encode([*wanted.prompt.token_ids, *before])
    donor = None if wanted.donor is None else model.encode([*wanted.donor.token_ids, *before])
    return replace(wanted, prompt=prompt, donor=donor, position=len(prompt) - 1)


def _asked(model: Model, wanted: Sequence[_Wanted]) -> list[Target]:
    """The targets, with the model's own predictions filled in."""
    bases = torch.arange(len(wanted))
    columns = torch.tensor([asked.position for asked in wanted])
    readout = build_readout(model.runtime, [], bases, [bases], [columns], logits=True)
    logits = model.engine.record([asked.prompt.token_ids for asked in wanted], (), readout=readout).logits
    assert logits is not None
    size = logits.shape[1]
    targets = []
    for row, asked in zip(logits.float().cpu(), wanted, strict=True):
        likeliest = torch.topk(row, 2).indices.tolist()
        target = likeliest[0] if asked.target is None else check_token_ids([asked.target], "answer")[0]
        tokens: tuple[int, ...] = (target,)
        if asked.counterfactual == RUNNER_UP:
            tokens = (target, next(token for token in likeliest if token != target))
        elif asked.counterfactual != NONE:
            tokens = (target, check_token_ids([asked.counterfactual], "distractor")[0])
        if max(tokens) >= size:
            raise InputError(f"{asked.name}: token id {max(tokens)} is not in the model's vocabulary (0 to {size - 1})")
        if len(set(tokens)) < len(tokens):
            raise InputError(f"{asked.name}: target and counterfactual token are the same")
        rank = int((row > row[target]).sum())
        targets.append(Target(asked.name, asked.prompt, tokens, asked.position, rank, asked.donor))
    return targets
