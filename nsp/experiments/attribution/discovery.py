"""The circuit of one prompt in one call: attribution by one method, and the selection of its strongest units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsp.experiments.arguments import recipe_value
from nsp.experiments.attribution.recipe import RUNNER_UP, Selection
from nsp.experiments.attribution.selection import select as select_units
from nsp.experiments.circuits import Circuit
from nsp.experiments.functions import door
from nsp.model import Model


def discover(
    model: Model,
    prompt: Any,
    *,
    target: str | int | None = None,
    counterfactual: str | int | None = RUNNER_UP,
    method: str = "relp",
    component: str = "mlp_neurons",
    top_k: int | None = 100,
    pieces: str = "single",
    select: Selection | Mapping[str, Any] | None = None,
    **options: Any,
) -> Circuit:
    """The circuit of one prompt by one method: attribution and selection in one call.

    Args:
        model: a loaded model.
        prompt: a text, chat messages, token ids, or a mapping with prompt, answer, distractor, donor and name.
        target: the token that should be answered, or its id (the recipe's ``answer``); None takes the model's most
            likely one.
        counterfactual: the token that the target is measured against: ``runner-up``, a token or its id, or None for the
            target alone.
        method: whose scores decide: atp, atp_ig, eap_ig, grad_x_act, relp.
        component: whose units make the circuit.
        top_k: how many of the strongest units are kept.
        pieces: which token of a target of several is attributed (the recipe's ``target``): single, first, last.
        select: chooses more finely than ``top_k``, as the recipe's ``select``.
        options: further keys of `nsp.experiments.attribution`: chat, positions, donor, ...

    Raises:
        InputError: a key is wrong, or does not fit the model.
    """
    chosen = {**({"top_k": top_k} if select is None else recipe_value(select)), "method": method}
    tree = door("attribution")(
        model,
        [prompt if isinstance(prompt, Mapping) else {"prompt": prompt}],
        answer=target,
        counterfactual=counterfactual,
        target=pieces,
        methods=[method],
        components=[component],
        select=chosen,
        **options,
    )
    return select_units(tree, component=component, prompt=0, **chosen)
