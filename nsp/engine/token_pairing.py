"""One prompt as two models read it, and which position of one stands for which of the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsp.datasets.prompts import Prompt
from nsp.engine.branches import Ints
from nsp.errors import InputError


@dataclass(frozen=True, eq=False)
class Paired:
    """One prompt as both models read it.

    Attributes:
        where: the aligned run's position for each position of the base run, -1 where it has none.
    """

    aligned: Prompt
    base: Prompt
    where: Ints

    @property
    def shared(self) -> tuple[int, ...]:
        """The base's positions that have a counterpart."""
        return tuple(int(position) for position in np.flatnonzero(self.where >= 0))


def pair_prompts(aligned: Prompt, base: Prompt) -> Paired:
    """Find each base token's counterpart: the aligned run's token that ends at the same character.

    There both models have read the same text. Equal tokens correspond one by one. InputError where offsets are unknown
    or the last tokens do not end together.
    """
    if aligned.token_ids == base.token_ids:
        return Paired(aligned, base, np.arange(len(base)))
    if aligned.offsets is None or base.offsets is None or aligned.text != base.text:
        raise InputError(
            f"the two models split a prompt ({base.title()}) into other tokens, and a tokenizer that gives no character offsets "
            "leaves no way to match them; take models with one tokenizer"
        )
    ends = {stop: position for position, (start, stop) in enumerate(aligned.offsets) if stop > start}
    where = np.array([ends.get(stop, -1) if stop > start else -1 for start, stop in base.offsets], dtype=np.int64)
    if where[-1] < 0 or where[-1] != len(aligned) - 1:
        raise InputError(
            f"the two models' last tokens of a prompt ({base.title()}) do not end at the same character, so their next-token "
            "distributions are about different texts"
        )
    return Paired(aligned, base, where)
