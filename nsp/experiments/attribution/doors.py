"""Attribution: which neurons, heads or edges carry an answer, from gradients; and the proof of it by exact patching.

Kind ``attribution``. The methods are in `nsp.experiments.attribution.scores`, the choice of circuits in `nsp.experiments.attribution.selection`,
circuits as values in `nsp.experiments.circuits`, what is proved and how in `nsp.experiments.attribution.verification`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from nsp.errors import InputError
from nsp.experiments import runner
from nsp.experiments.attribution.job import KIND, prepare
from nsp.experiments.attribution.recipe import NONE, RUNNER_UP, AttributionRecipe, Selection
from nsp.experiments.attribution.selection import select, universal_neurons
from nsp.experiments.attribution.summary import summarise
from nsp.experiments.circuits import Circuit
from nsp.experiments.prompt_options import ChatOptions
from nsp.experiments.selections import as_list
from nsp.model import Model
from nsp.recipe_errors import checked

__all__ = ["Selection", "attribution", "discover", "prepare", "select", "summarise", "universal_neurons"]


def attribution(
    model: Model,
    prompts: Any,
    *,
    target: str | int | None = None,
    counterfactual: str | int | None = RUNNER_UP,
    counterfactual_prompts: Sequence[Any] | None = None,
    methods: str | Sequence[str] = ("relp",),
    components: str | Sequence[str] = ("mlp_neurons",),
    donor: str = "zero",
    reference: Sequence[Any] | str | None = None,
    reference_over: str | None = None,
    positions: Any = "last",
    layers: Any = "all",
    position: Any = "last",
    chat: ChatOptions | Mapping[str, Any] | None = None,
    pieces: str = "single",
    measure: str = "logit",
    steps: int = 5,
    attention: str = "frozen",
    known: bool = True,
    select: Selection | Mapping[str, Any] | None = None,
    verify: Mapping[str, Any] | None = None,
    memory: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> xr.DataTree:
    """Attribution from Python: the recipe's keys as arguments, the recipe's results.

    Args:
        model: a loaded model.
        prompts: one prompt, a list of prompts (or of mappings with prompt, answer, distractor, donor), the name of a built-in
            set (``fact-questions``, ``facts``) or a mapping such as ``{"set": "facts", "size": 5}``.
        target: the answer of every prompt that names none; None takes the model's most likely token.
        counterfactual: a token, ``runner-up``, or None (or ``none``) for the target alone.
        counterfactual_prompts: the donor of each prompt, for ``donor="counterfactual"``.
        pieces: of an answer of several tokens: ``single`` (an error), ``first``, ``last``, ``all``.
        methods, components, donor, reference, reference_over, positions, layers, position, chat, measure: as in the recipe.
        steps, attention, known, select, verify, memory, seed: as in the recipe.
        out: where to keep the run as a store; None keeps it in memory alone.

    Returns a tree with ``attribution/<component>``, ``circuit``, ``effects``, ``baseline`` and ``inputs``.
    """
    keys: dict[str, Any] = {
        "kind": KIND, "prompts": _prompts(prompts, target, counterfactual_prompts), "methods": as_list(methods),
        "components": as_list(components), "donor": donor, "positions": positions, "layers": layers, "position": position,
        "target": pieces, "measure": measure, "steps": steps, "attention": attention, "known": known, "memory": memory, "seed": seed,
        "counterfactual": NONE if counterfactual is None else counterfactual, "verify": verify,
        "reference_over": reference_over,
    }  # fmt: skip
    if isinstance(keys["counterfactual"], int):
        # A recipe's counterfactual is text; a token id is stated prompt by prompt.
        keys["prompts"] = _with_distractor(keys["prompts"], keys.pop("counterfactual"))
    if reference is not None:
        keys["reference"] = reference if isinstance(reference, str) else as_list(reference)
    if chat is not None:
        keys["chat"] = chat
    if select is not None:
        keys["select"] = select.model_dump(exclude_unset=True) if isinstance(select, Selection) else select
    return runner.results(prepare(model, checked(AttributionRecipe, keys)), out=out, force=force, progress=progress)


def discover(
    model: Model,
    prompt: Any,
    *,
    target: str | int | None = None,
    counterfactual: str | int | None = RUNNER_UP,
    method: str = "relp",
    component: str = "mlp_neurons",
    top_k: int | None = 100,
    select: Selection | Mapping[str, Any] | None = None,
    **options: Any,
) -> Circuit:
    """The circuit of one prompt by one method: attribution and selection in one call.

    ``select`` chooses more finely than ``top_k``; ``options`` are those of `attribution` (chat, positions, donor, ...).
    """
    chosen: dict[str, Any] = {"top_k": top_k}
    if select is not None:
        chosen = select.model_dump(exclude_unset=True) if isinstance(select, Selection) else dict(select)
    chosen["method"] = method
    one = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    tree = attribution(
        model,
        [one],
        target=target,
        counterfactual=counterfactual,
        methods=(method,),
        components=(component,),
        select=chosen,
        **options,
    )
    return _select(tree, checked(Selection, chosen, "select"), component=component, prompt=0)


_select = select


def _is_one_prompt(prompts: Any) -> bool:
    """Token ids, chat messages, or a text that is no built-in set and no file."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return False
    return bool(prompts) and (isinstance(prompts[0], int) or (isinstance(prompts[0], Mapping) and "role" in prompts[0]))


def _prompts(prompts: Any, target: str | int | None, donors: Sequence[Any] | None) -> Any:
    from nsp.experiments.attribution.recipe import FACT_SETS

    if isinstance(prompts, Mapping) or (isinstance(prompts, str) and prompts in FACT_SETS):
        if target is not None or donors is not None:
            raise InputError("a built-in set or a file has its own answers and no counterfactual prompts")
        return prompts
    given = [prompts] if isinstance(prompts, str) or _is_one_prompt(prompts) else as_list(prompts)
    made = [dict(one) if isinstance(one, Mapping) else {"prompt": one} for one in given]
    if donors is not None and len(donors) != len(made):
        raise InputError(f"{len(made)} prompts need as many counterfactual prompts; got {len(donors)}")
    for number, one in enumerate(made):
        if target is not None:
            one.setdefault("answer", target)
        if donors is not None:
            one["donor"] = donors[number]
    return made


def _with_distractor(prompts: Any, token: int) -> Any:
    if not isinstance(prompts, list):
        raise InputError("a built-in set takes its counterfactual token as text, runner-up or none")
    return [{"distractor": token, **one} for one in prompts]
